"""Subsections: optional parts of a device's state, found by their names."""

from __future__ import annotations

import io
from types import SimpleNamespace
from typing import Any

import pytest

from stillframe.board.state.fields import (
    StateDescription,
    boolean,
    buffer,
    describe_state,
    load_state,
    save_state,
    struct,
    struct_array,
    u8,
    u16,
)
from stillframe.errors import DataError
from stillframe.vmstate.source import StreamSource


def sub(name: str, field: str, **more: Any) -> StateDescription:
    return StateDescription(name, 2, 1, (u8(field),), **more)


DEVICE = StateDescription(
    "dev",
    1,
    1,
    (u8("n"),),
    subsections=(
        sub("dev/a", "a", needed=lambda d: d.a != 0),
        sub("dev/b", "b", needed=lambda d: d.b != 0, subsections=(sub("dev/b/c", "c"),)),
    ),
)
A = b"\x05\x05dev/a\0\0\0\2"
B = b"\x05\x05dev/b\0\0\0\2"
C = b"\x05\x07dev/b/c\0\0\0\2"


def loaded(description: StateDescription, data: bytes, **values: Any) -> tuple[Any, StreamSource]:
    device = SimpleNamespace(**values)
    source = StreamSource(io.BytesIO(data))
    load_state(description, device, source, description.version_id)
    return device, source


@pytest.mark.parametrize(
    ("a", "b", "data"),
    [
        (0, 0, b"\1"),
        (2, 0, b"\1" + A + b"\2"),
        (0, 3, b"\1" + B + b"\3" + C + b"\4"),
        (2, 3, b"\1" + A + b"\2" + B + b"\3" + C + b"\4"),
    ],
)
def test_only_what_is_needed_is_written(a: int, b: int, data: bytes) -> None:
    device = SimpleNamespace(n=1, a=a, b=b, c=4)
    assert save_state(DEVICE, device) == data
    described = describe_state(DEVICE, device)
    names = [s["vmsd_name"] for s in described.get("subsections", ())]
    assert names == ["dev/a"] * bool(a) + ["dev/b"] * bool(b)
    assert ("subsections" in described) == bool(names)
    into, source = loaded(DEVICE, data, n=0, a=0, b=0, c=4)
    assert into == device
    assert source.peek() is None


def test_any_order_is_read() -> None:
    device, _ = loaded(DEVICE, b"\1" + B + b"\3" + C + b"\4" + A + b"\2")
    assert device == SimpleNamespace(n=1, a=2, b=3, c=4)


def test_older_subsections_load() -> None:
    device, _ = loaded(DEVICE, b"\1" + A[:-1] + b"\1" + b"\2")
    assert device.a == 2


@pytest.mark.parametrize(
    ("data", "what"),
    [
        (A + b"\2" + A + b"\2", "device 'dev' has subsection 'dev/a' twice"),
        (
            b"\x05\x05dev/x\0\0\0\1\0",
            "device 'dev' has an unknown subsection 'dev/x'",
        ),
        (A[:-1] + b"\3" + b"\2", "'dev/a' of device 'dev' has version 3, .* knows up to 2"),
        (A[:-1] + b"\0" + b"\2", "'dev/a' of device 'dev' has version 0, .* needs at least 1"),
        (A, "truncated in field 'a' of device 'dev'"),
        (A[:-2], "truncated in subsection 'dev/a' of device 'dev'"),
        (A[:6], "truncated in a subsection of device 'dev'"),
        (b"\x05\x05dev/\1", "a subsection of device 'dev' is not a name"),
    ],
)
def test_bad_subsections_are_refused(data: bytes, what: str) -> None:
    with pytest.raises(DataError, match=what):
        loaded(DEVICE, b"\1" + data)


@pytest.mark.parametrize(
    "data",
    [b"\x05", b"\x05\x04dev/", b"\x05\x05dex/a", b"\x05\xffdevice", b"\x05\x05dev", b"\x7e"],
)
def test_what_is_no_subsection_is_left(data: bytes) -> None:
    device, source = loaded(DEVICE, b"\1" + data)
    assert device.n == 1
    assert source.rest(100, "the rest") == data


def test_nothing_beyond_a_mismatch_is_waited_for() -> None:
    class Slow:
        """Gives a byte at a time, and fails where a live stream would block."""

        def __init__(self, data: bytes) -> None:
            self.data = data

        def read(self, size: int) -> bytes:
            assert self.data, "would wait"
            byte, self.data = self.data[:1], self.data[1:]
            return byte

    source = StreamSource(Slow(b"\1\x05\xffdex"))
    load_state(DEVICE, SimpleNamespace(), source, 1)
    assert source.offset == 1


INNER = StateDescription(
    "inner", 1, 1, (u8("x"),), (sub("inner/y", "y", needed=lambda d: d.y != 0),)
)
OUTER = StateDescription(
    "outer",
    1,
    1,
    (struct("first", INNER), struct_array("others", INNER, 2), u16("last")),
    (StateDescription("outer/z", 1, 1, (u8("z"),)),),
)
Y = b"\x05\x07inner/y\0\0\0\2"
Z = b"\x05\x07outer/z\0\0\0\1"


def outer() -> SimpleNamespace:
    return SimpleNamespace(
        first=SimpleNamespace(x=1, y=2),
        others=[SimpleNamespace(x=3, y=0), SimpleNamespace(x=4, y=5)],
        last=6,
        z=7,
    )


def test_structures_have_theirs_directly_behind() -> None:
    data = b"\1" + Y + b"\2" + b"\3" + b"\4" + Y + b"\5" + b"\0\6" + Z + b"\7"
    assert save_state(OUTER, outer()) == data
    into, source = loaded(
        OUTER,
        data,
        first=SimpleNamespace(y=0),
        others=[SimpleNamespace(y=0), SimpleNamespace(y=0)],
    )
    assert into == outer()
    assert source.peek() is None


def test_elements_with_subsections_are_described_one_by_one() -> None:
    fields = describe_state(OUTER, outer())["fields"]
    x = {"name": "x", "type": "uint8", "size": 1}
    y = {
        "vmsd_name": "inner/y",
        "version": 2,
        "fields": [{"name": "y", "type": "uint8", "size": 1}],
    }
    with_y = {"vmsd_name": "inner", "version": 1, "fields": [x], "subsections": [y]}
    without = {"vmsd_name": "inner", "version": 1, "fields": [x]}
    size = 1 + len(Y) + 1
    assert fields == [
        {"name": "first", "type": "struct", "struct": with_y, "size": size},
        {"name": "others", "index": 0, "type": "struct", "struct": without, "size": 1},
        {"name": "others", "index": 1, "type": "struct", "struct": with_y, "size": size},
        {"name": "last", "type": "uint16", "size": 2},
    ]


def test_unknown_subsection_of_a_structure_names_the_field() -> None:
    data = b"\1" + b"\x05\x07inner/q\0\0\0\1"
    with pytest.raises(DataError) as caught:
        loaded(OUTER, data, first=SimpleNamespace(), others=[SimpleNamespace()] * 2)
    assert caught.value.what == (
        "device 'outer' has an unknown subsection 'inner/q' in field 'first' (at byte 1)"
    )


def test_state_that_reads_in_two_ways_is_not_saved() -> None:
    """A guest's bytes behind a structure may look like a subsection of it."""
    description = StateDescription(
        "outer", 1, 1, (struct("s", INNER), buffer("guests", 9), u8("n"))
    )
    device = SimpleNamespace(s=SimpleNamespace(x=1, y=0), guests=b"\x05\x07inner/y", n=0)
    with pytest.raises(DataError, match="device 'outer' can be read in more than one way"):
        save_state(description, device)
    for harmless in (b"\x05\x06inner/y", b"\x04\x07inner/y", b"\x05\x07innex/y"):
        device.guests = harmless
        data = save_state(description, device)
        into, _ = loaded(description, data, s=SimpleNamespace(y=0))
        assert into == device


BARE = StateDescription("bare", 1, 1, (u8("x"),))
GUESTS = StateDescription(
    "outer", 1, 1, (struct_array("s", BARE, 2), buffer("guests", 9), boolean("n"))
)
FOOTER = b"\x7e\0\0\0\2"


def bare() -> list[SimpleNamespace]:
    return [SimpleNamespace(x=1), SimpleNamespace(x=2)]


def test_a_guest_cannot_plant_a_subsection() -> None:
    """A structure without subsections is read without any, whatever follows it."""
    device = SimpleNamespace(s=bare(), guests=b"\x05\x06bare/y!", n=True)
    data = save_state(GUESTS, device)
    for behind in (b"", FOOTER):
        into, source = loaded(GUESTS, data + behind, s=bare())
        assert into == device
        assert source.offset == len(data)


@pytest.mark.parametrize(
    ("found", "why"),
    [
        (b"\x05\x06bare/y\0\0\0\1" + bytes(10) + FOOTER, "the state does not end where it must"),
        (b"\x05\x06bare/", "the stream is truncated in field 'guests' of device 'outer'"),
        (b"\x05\x06bare/y\0\7", "field 'n' of device 'outer' is neither false nor true"),
    ],
)
def test_unknown_subsection_of_a_structure_without_any(found: bytes, why: str) -> None:
    with pytest.raises(DataError) as caught:
        loaded(GUESTS, b"\1\2" + found, s=bare())
    assert "'outer' seems to have an unknown subsection 'bare/" in caught.value.what
    assert "in field 's[1]' (at byte 2)" in caught.value.what
    assert caught.value.why is not None
    assert caught.value.why.startswith(why)
