"""Any declared device comes back as it was, is as long as described, and no damage to its state
gives anything but a DataError."""

from __future__ import annotations

import copy
import io
import json
from collections.abc import Callable
from contextlib import suppress
from types import SimpleNamespace
from typing import Any, NamedTuple

import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from stillframe.board.state import fields
from stillframe.board.state.fields import (
    Field,
    StateDescription,
    describe_state,
    load_state,
    save_state,
)
from stillframe.board.state.global_state import GLOBAL_STATE, GlobalState
from stillframe.board.state.handlers import SaveStateRegistry
from stillframe.board.state.load_state import StateLoader
from stillframe.board.state.save_state import StateSaver
from stillframe.board.state.state_description import Embedded, EmbeddedArray, Unused
from stillframe.errors import DataError
from stillframe.vmstate.description import described_sizes
from stillframe.vmstate.source import StreamSource
from stillframe.vmstate.wire import RAM_IDSTR, RAM_VERSION
from tests.support.analyze_reader import Analysis, description
from tests.support.stream_build import Pipe
from tests.support.stream_summary import verify_stream
from tests.unit.board.state.toys import PAGE, ToyRam

NEWEST = 4
RANGES: dict[Callable[..., Field], tuple[int, int]] = {
    fields.u8: (0, (1 << 8) - 1),
    fields.u16: (0, (1 << 16) - 1),
    fields.u32: (0, (1 << 32) - 1),
    fields.u64: (0, (1 << 64) - 1),
    fields.i32: (-(1 << 31), (1 << 31) - 1),
    fields.i64: (-(1 << 63), (1 << 63) - 1),
    fields.boolean: (0, 1),
}
SCALARS = sorted(RANGES, key=lambda scalar: scalar.__name__)
# Bytes that look like subsections and footers are the interesting ones.
BYTES = st.binary(max_size=12) | st.sampled_from(
    [b"\x05\x04s2/x", b"\x05\x04s1/x", b"\x05\x05dev/x", b"\x05", b"\x7e\0\0\0\2"]
)


class Made(NamedTuple):
    """A description, a device, and the same device at reset."""

    description: StateDescription
    device: SimpleNamespace
    reset: SimpleNamespace


class Maker:
    """Draws descriptions; every name is used once."""

    def __init__(self, draw: st.DrawFn) -> None:
        self._draw = draw
        self._number = 0

    def name(self, letter: str) -> str:
        self._number += 1
        return f"{letter}{self._number}"

    def made(self, name: str, *, depth: int, into: Made | None = None) -> Made:
        """A description; with ``into`` of one more part of the same device."""
        device = into.device if into else SimpleNamespace()
        reset = into.reset if into else SimpleNamespace()
        declared: list[Field] = []
        for _ in range(self._draw(st.integers(0, 5))):
            declared += self._fields(device, reset, depth)
        description = StateDescription(name, NEWEST, 0, tuple(declared))
        made = Made(description, device, reset)
        if depth == 0:
            return made
        subsections = []
        for _ in range(self._draw(st.integers(0, 2))):
            wanted = self._draw(st.booleans())
            part = self.made(f"{name}/{self.name('x')}", depth=depth - 1, into=made).description
            subsections.append(with_changes(part, needed=lambda device, wanted=wanted: wanted))
        return made._replace(description=with_changes(description, subsections=tuple(subsections)))

    def _fields(self, device: SimpleNamespace, reset: SimpleNamespace, depth: int) -> list[Field]:
        draw = self._draw
        name = self.name("f")
        more: dict[str, Any] = {"since": draw(st.integers(0, NEWEST))}
        if draw(st.integers(0, 3)) == 0:
            there = draw(st.integers(0, NEWEST))
            more["exists"] = lambda device, version: version != there
        scalar = draw(st.sampled_from(SCALARS))
        kinds = ["scalar", "scalar", "buffer", "array", "unused", "variable", "varray"]
        kind = draw(st.sampled_from(kinds + ["struct", "structs"] * (depth > 0)))
        if kind == "scalar":
            setattr(device, name, self._value(scalar))
            setattr(reset, name, self._value(scalar))
            return [scalar(name, **more)]
        if kind == "unused":
            return [fields.unused(draw(st.integers(1, 9)), **more)]
        if kind == "struct":
            made = self.made(self.name("s"), depth=depth - 1)
            setattr(device, name, made.device)
            setattr(reset, name, made.reset)
            return [fields.struct(name, made.description, **more)]
        if kind == "structs":
            made = self.made(self.name("s"), depth=depth - 1)
            count = draw(st.integers(1, 3))
            setattr(device, name, [copy.deepcopy(made.device) for _ in range(count)])
            setattr(reset, name, tuple(copy.deepcopy(made.reset) for _ in range(count)))
            return [fields.struct_array(name, made.description, count, **more)]
        if kind in ("buffer", "variable"):
            content: Any = draw(BYTES) or b"\0"
            other: Any = draw(st.sampled_from([b"", bytearray(b"old"), bytes(3)]))
        else:
            content = tuple(
                self._value(scalar) for _ in range(draw(st.integers(kind == "array", 4)))
            )
            other = draw(st.sampled_from([[], [1], ()]))
            content = content if other == () else list(content)
        setattr(device, name, content)
        setattr(reset, name, other)
        if kind == "buffer":
            return [fields.buffer(name, len(content), **more)]
        if kind == "array":
            return [fields.array(name, scalar, len(content), **more)]
        length = self.name("n")
        setattr(device, length, len(content))
        setattr(reset, length, 0)
        number = fields.u8(length, **more)
        if kind == "variable":
            return [number, fields.variable_buffer(name, length, limit_bytes=16, **more)]
        return [number, fields.variable_array(name, scalar, length, limit=4, **more)]

    def _value(self, scalar: Callable[..., Field]) -> Any:
        value = self._draw(st.integers(*RANGES[scalar]))
        return bool(value) if scalar is fields.boolean else value


def with_changes(description: StateDescription, **changes: Any) -> StateDescription:
    names = ("name", "version_id", "minimum_version_id", "fields", "subsections", "needed")
    return StateDescription(**{n: getattr(description, n) for n in names} | changes)


@st.composite
def devices(draw: st.DrawFn, *, depth: int = 2) -> Made:
    return Maker(draw).made("dev", depth=depth)


def saved(made: Made) -> bytes:
    """The payload; a state that could be read in two ways is another test's."""
    try:
        return save_state(made.description, made.device)
    except DataError:
        assume(False)
        raise


def check_loaded(made: Made, loaded: SimpleNamespace, version: int) -> None:
    """What the stream had is as saved, everything else as at reset."""
    check_part(made.description, made.device, made.reset, loaded, version)


def check_part(
    description: StateDescription, device: Any, reset: Any, loaded: Any, version: int
) -> None:
    for field in description.fields:
        kind = field.kind
        if isinstance(kind, Unused):
            continue
        present = field.present(device, version)
        a, b, c = (getattr(d, field.name) for d in (device, reset, loaded))
        if isinstance(kind, Embedded | EmbeddedArray) and present:
            inner = kind.description
            parts = zip(a, b, c, strict=True) if isinstance(kind, EmbeddedArray) else [(a, b, c)]
            for part in parts:
                check_part(inner, *part, inner.version_id)
        else:
            assert c == (a if present else b), field.name
    for subsection in description.subsections:
        wanted = subsection.needed is None or subsection.needed(device)
        if wanted:
            check_part(subsection, device, reset, loaded, subsection.version_id)


def load(made: Made, payload: bytes, version: int = NEWEST) -> tuple[Any, StreamSource]:
    loaded = copy.deepcopy(made.reset)
    source = StreamSource(Pipe(payload, 7))
    load_state(made.description, loaded, source, version)
    return loaded, source


@settings(deadline=None, max_examples=120)
@given(devices(), BYTES)
def test_round_trip_and_described_size(made: Made, behind: bytes) -> None:
    payload = saved(made)
    assume(not (behind.startswith(b"\x05") and b"/" in behind))
    loaded, source = load(made, payload + behind)
    assert source.offset == len(payload)
    check_loaded(made, loaded, NEWEST)
    entry = {"name": "dev", "instance_id": 0, **describe_state(made.description, made.device)}
    text = json.dumps({"page_size": PAGE, "devices": [entry]}).encode()
    assert described_sizes(text, text_offset=0) == {("dev", 0): [len(payload)]}


@settings(deadline=None, max_examples=120)
@given(devices(depth=1), st.integers(0, NEWEST))
def test_older_versions_load(made: Made, version: int) -> None:
    """What an older version of the device would have written."""
    older = with_changes(
        made.description,
        version_id=version,
        fields=tuple(f for f in made.description.fields if f.since <= version),
    )
    payload = saved(made._replace(description=older))
    loaded, source = load(made, payload, version)
    assert source.peek() is None
    check_loaded(made, loaded, version)


@settings(deadline=None, max_examples=150)
@given(devices(), st.data())
def test_truncation_gives_only_a_data_error(made: Made, data: st.DataObject) -> None:
    payload = saved(made)
    cut = payload[: data.draw(st.integers(0, max(0, len(payload) - 1)))]
    # Without an error it was cut before or in the head of a subsection; the footer is missed.
    _, error = load_damaged(made, cut)
    assert error is None or "'dev'" in error.what


@settings(deadline=None, max_examples=150)
@given(devices(), st.lists(st.tuples(st.integers(0, 1 << 16), st.integers(1, 255)), min_size=1))
def test_flipped_bits_give_only_a_data_error(made: Made, flips: list[tuple[int, int]]) -> None:
    payload = bytearray(saved(made))
    assume(payload)
    for place, bits in flips:
        payload[place % len(payload)] ^= bits
    _, error = load_damaged(made, bytes(payload))
    assert error is None or "'dev'" in error.what


def load_damaged(made: Made, payload: bytes) -> tuple[int, DataError | None]:
    """Where the load ended, and with what."""
    source = StreamSource(Pipe(payload, 7))
    try:
        load_state(made.description, copy.deepcopy(made.reset), source, NEWEST)
    except DataError as error:
        return source.offset, error
    return source.offset, None


class Machine:
    """RAM, the run state and some devices; ``reset`` has the devices' other values."""

    def __init__(self, made: list[Made], pages: bytes, *, reset: bool) -> None:
        content = b"".join(bytes((b,)) * PAGE for b in pages)
        self.ram = ToyRam({"ram0": bytes(len(content)) if reset else content})
        self.devices = [copy.deepcopy(m.reset if reset else m.device) for m in made]
        self.run_state = GlobalState(lambda: "running")
        self.registry = SaveStateRegistry()
        for m, device in zip(made, self.devices, strict=True):
            self.registry.register_device("bus/dev", m.description, device)
        self.registry.register(RAM_IDSTR, self.ram, version_id=RAM_VERSION)
        self.registry.register_device("globalstate", GLOBAL_STATE, self.run_state)

    def stream(self) -> bytes:
        saver = StateSaver(self.registry, machine_type="toy-1", inactivate_disks=lambda: None)
        out = io.BytesIO()
        saver.header(out)
        saver.setup(out)
        while not saver.iterate(out):
            pass
        try:
            saver.complete_precopy(out, iterable_only=False, inactivate_disks=False)
        except DataError:
            assume(False)
        return out.getvalue()

    def load(self, data: bytes) -> StreamSource:
        source = StreamSource(Pipe(data, 1000))
        StateLoader(self.registry, machine_type="toy-1").load(source)
        return source


MACHINES = st.tuples(st.lists(devices(), max_size=3), st.binary(min_size=1, max_size=3))


@settings(deadline=None, max_examples=150)
@given(MACHINES)
def test_three_readers_agree(parts: tuple[list[Made], bytes]) -> None:
    """The loader, the reader of snapshots, and the independent one read the stream to its end."""
    made, pages = parts
    machine = Machine(made, pages, reset=False)
    data = machine.stream()
    loaded = Machine(made, pages, reset=True)
    assert loaded.load(data).peek() is None
    assert loaded.ram.blocks == machine.ram.blocks
    assert loaded.run_state.run_state == "running"
    for m, device in zip(made, loaded.devices, strict=True):
        check_loaded(m, device, NEWEST)
    summary = verify_stream(io.BytesIO(data))
    assert summary.stream_bytes == len(data)
    assert summary.devices == ("bus/dev",) * len(made) + ("globalstate",)
    assert summary.description_sizes_agree is True
    assert all(b.missing_pages == 0 for b in summary.blocks)
    analysis = Analysis(data)
    assert analysis.configuration == "toy-1"
    assert analysis.pages + analysis.zero == len(pages)
    assert len(analysis.state) == len(made) + 1


@settings(deadline=None, max_examples=120)
@given(MACHINES, st.data())
def test_damaged_streams_give_only_a_data_error(
    parts: tuple[list[Made], bytes], data: st.DataObject
) -> None:
    made, pages = parts
    stream = bytearray(Machine(made, pages, reset=False).stream())
    eof = description(bytes(stream))[1] - 1
    # Most of the bytes are pages and JSON, in which nothing can go wrong.
    places = st.integers(0, eof) | st.integers(eof, len(stream) - 1)
    for place in data.draw(st.lists(places, max_size=4)):
        stream[place] ^= data.draw(st.integers(1, 255))
    end = data.draw(st.none() | places)
    with suppress(DataError):
        Machine(made, pages, reset=True).load(bytes(stream[:end]))


@settings(deadline=None, max_examples=150)
@given(MACHINES, st.integers(0, 1 << 16))
def test_a_cut_stream_is_never_a_whole_one(parts: tuple[list[Made], bytes], place: int) -> None:
    made, pages = parts
    stream = Machine(made, pages, reset=False).stream()
    eof = description(stream)[1] - 1
    with pytest.raises(DataError):
        Machine(made, pages, reset=True).load(stream[: place % (eof + 1)])
