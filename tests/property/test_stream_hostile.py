"""Damaged streams: nothing but DataError may come out, and it says where."""

from __future__ import annotations

import io
from collections.abc import Callable
from struct import pack

from hypothesis import example, given, settings
from hypothesis import strategies as st

from stillframe.errors import DataError
from stillframe.vmstate import writer
from stillframe.vmstate.devices import make_section, split_device_state
from stillframe.vmstate.x86_cpu import parse_x86_cpu
from tests.support import stream_build as sb
from tests.support.stream_summary import verify_stream

DEVICES = (
    sb.device(0, "timer", b"t" * 24),
    sb.device(
        40, "0/virtio-mem-device-early", pack(">QQQIQ", 0, 1 << 28, 1 << 21, 0, 0) + bytes(16)
    ),
    sb.device(6, "cpu", bytes(range(256)) * 4),
)
SEEDS = (
    sb.head()
    + writer.ram_start_section((("ram0", 64 * sb.PAGE), ("rom", sb.PAGE)), section_id=2)
    + DEVICES[1].raw
    + sb.part(
        writer.ram_page_record(0, b"A" * sb.PAGE, block="ram0")
        + writer.ram_page_record(sb.PAGE, b"B" * sb.PAGE, block=None)
        + b"".join(writer.ram_zero_record(i * sb.PAGE, block=None) for i in range(2, 64))
        + writer.ram_zero_record(0, block="rom")
    )
    + writer.ram_end_section(2)
    + sb.tail(DEVICES[::2]),
    sb.configuration("virt", sb.capabilities("x-ignore-shared", "mapped-ram"))
    + b"\x08\0\3\0\x10" + bytes(16)
    + sb.start(
        sb.word(sb.PAGE, 4) + sb.name("a") + pack(">QQ", sb.PAGE, 0)
        + pack(">IQQQ", 1, 4096, 0, 0) + sb.word(0, 16)
    )
    + sb.tail(DEVICES[:1], described=False),
)  # fmt: skip

EDITS = st.lists(
    st.tuples(
        st.integers(0, 1 << 16),
        st.sampled_from(["flip", "cut", "insert", "copy", "word"]),
        st.binary(min_size=1, max_size=12),
    ),
    min_size=1,
    max_size=4,
)


def damage(data: bytes, edits: list[tuple[int, str, bytes]]) -> bytes:
    out = bytearray(data)
    for number, kind, piece in edits:
        place = number % (len(out) + 1)
        match kind:
            case "flip":
                if place < len(out):
                    out[place] ^= piece[0] or 1
            case "cut":
                del out[place:]
            case "insert":
                out[place:place] = piece
            case "copy":
                out[place:place] = out[: piece[0] * 8]
            case _:
                out[place : place + len(piece)] = piece
    return bytes(out)


def error_of(action: Callable[..., object], *arguments: object) -> DataError | None:
    """The only error that may come out, if one does."""
    try:
        action(*arguments)
    except DataError as error:
        return error
    return None


@settings(deadline=None, max_examples=400)
@given(st.sampled_from(SEEDS), EDITS)
def test_damaged_stream(seed: bytes, edits: list[tuple[int, str, bytes]]) -> None:
    data = damage(seed, edits)
    error = error_of(verify_stream, io.BytesIO(data))
    assert error is None or error.offset_bytes is not None


@settings(deadline=None, max_examples=200)
@given(st.binary(max_size=300))
@example(b"")
def test_anything_after_a_header(rest: bytes) -> None:
    ram = sb.head() + writer.ram_start_section((("a", 4096),), section_id=2)
    for stream in (rest, sb.head() + rest, ram + rest):
        error = error_of(verify_stream, sb.Pipe(stream, 7))
        assert error is None or error.offset_bytes is not None


@settings(deadline=None, max_examples=300)
@given(EDITS)
def test_damaged_device_state(edits: list[tuple[int, str, bytes]]) -> None:
    """What is cut is the data again, byte for byte."""
    state = writer.stream_header() + b"".join(d.raw for d in DEVICES) + writer.eof()
    data = damage(state, edits)
    try:
        sections = split_device_state(data)
    except DataError:
        return
    assert writer.stream_header() + b"".join(s.raw for s in sections) + writer.eof() == data
    # A state with no footer left is one of a machine type that has none.
    assert any(
        all(
            section
            == make_section(
                section_id=section.section_id,
                idstr=section.idstr,
                instance_id=section.instance_id,
                version_id=section.version_id,
                payload=section.payload,
                footer=footer,
            )
            for section in sections
        )
        for footer in (True, False)
    )


def test_a_state_whose_footers_are_gone_is_read_without() -> None:
    test_damaged_device_state.hypothesis.inner_test([(115, "cut", b"\0"), (19655, "flip", b"\0")])


@settings(deadline=None)
@given(st.binary(max_size=2000), st.integers(0, 20))
def test_any_cpu_payload(payload: bytes, version: int) -> None:
    error_of(parse_x86_cpu, payload, version)
