"""Whatever the writer writes, the reader reads back; whatever is cut, is found again."""

from __future__ import annotations

import io

from hypothesis import given, settings
from hypothesis import strategies as st

from stillframe.errors import DataError
from stillframe.vmstate import writer
from stillframe.vmstate.devices import (
    DeviceSection,
    describe,
    is_essential,
    make_global_state,
    make_section,
    split_device_state,
)
from stillframe.vmstate.reader import StreamReader
from stillframe.vmstate.records import Device
from tests.support.analyze_reader import Analysis
from tests.support.stream_build import PAGE, Pipe, replay
from tests.support.stream_summary import verify_stream

NAMES = st.text(st.characters(min_codepoint=0x21, max_codepoint=0x7E), min_size=1, max_size=255)
PAYLOADS = st.binary(max_size=200) | st.lists(
    st.sampled_from([b"\x7e", b"\0\0\0", b"\1", b"\2", b"\x04", b"a", bytes(50)]), max_size=40
).map(b"".join)


@st.composite
def sections(draw: st.DrawFn, *, wild: bool = False) -> tuple[DeviceSection, ...]:
    """Sections with unique ids and names; with ``wild`` the payloads hold pieces of footers."""
    ids = draw(st.lists(st.integers(0, 0xFFFFFFFF) | st.integers(0, 3), max_size=6, unique=True))
    names = draw(
        st.lists(
            st.tuples(NAMES, st.integers(0, 3)), min_size=len(ids), max_size=len(ids), unique=True
        )
    )
    return tuple(
        make_section(
            section_id=section_id,
            idstr=idstr,
            instance_id=instance_id,
            version_id=draw(st.integers(0, 0xFFFF)),
            payload=draw(PAYLOADS if wild else st.binary(max_size=64)),
        )
        for section_id, (idstr, instance_id) in zip(ids, names, strict=True)
    )


@st.composite
def ram(draw: st.DrawFn) -> dict[str, bytes]:
    """Blocks of a few pages, zero or filled with one byte."""
    names = draw(st.lists(NAMES, min_size=1, max_size=4, unique=True))
    return {
        n: b"".join(bytes((b,)) * PAGE for b in draw(st.binary(min_size=1, max_size=6)))
        for n in names
    }


def write(blocks: dict[str, bytes], devices: tuple[DeviceSection, ...], order: list[int]) -> bytes:
    """A whole stream; ``order`` shuffles the pages, and gives the number of parts."""
    ram_id = writer.choose_section_id(devices)
    pages = [(n, o) for n, r in blocks.items() for o in range(0, len(r), PAGE)]
    for place, other in enumerate(order):
        a, b = place % len(pages), other % len(pages)
        pages[a], pages[b] = pages[b], pages[a]
    out = [
        writer.stream_header(),
        writer.configuration_section("pc-q35-7.2"),
        writer.ram_start_section([(n, len(r)) for n, r in blocks.items()], section_id=ram_id),
    ]
    last: str | None = None
    step = max(1, len(order) + 1)
    for first in range(0, len(pages), step):
        out.append(writer.ram_part_prefix(ram_id))
        for name, offset in pages[first : first + step]:
            page = blocks[name][offset : offset + PAGE]
            block = None if name == last else name
            last = name
            if page.count(0) == PAGE:
                out.append(writer.ram_zero_record(offset, block=block))
            else:
                out.append(writer.ram_page_record(offset, page, block=block))
        out.append(writer.ram_part_suffix(ram_id))
    out.append(writer.ram_end_section(ram_id))
    out += [d.raw for d in devices]
    out.append(writer.eof())
    out.append(writer.vmdescription(describe(devices, target_page_bytes=PAGE)))
    return b"".join(out)


@settings(deadline=None, max_examples=200)
@given(ram(), sections(wild=True), st.lists(st.integers(0, 30), max_size=10), st.integers(1, 9000))
def test_round_trip(
    blocks: dict[str, bytes],
    devices: tuple[DeviceSection, ...],
    order: list[int],
    piece_bytes: int,
) -> None:
    """The description gives exact lengths, so no payload can confuse the reader."""
    devices = tuple(d for d in devices if d.idstr != "ram" and not d.idstr.endswith("-early"))
    data = write(blocks, devices, order)
    events = list(StreamReader(Pipe(data, piece_bytes)).events())
    assert replay(events) == blocks
    assert tuple(e.section for e in events if isinstance(e, Device)) == devices
    summary = verify_stream(io.BytesIO(data))
    assert summary.stream_bytes == len(data)
    assert summary.description_sizes_agree is True
    assert all(b.missing_pages == 0 for b in summary.blocks)
    analysis = Analysis(data)
    assert analysis.ram == {n: len(r) for n, r in blocks.items()}
    assert len(analysis.state) == len(devices)


AMBIGUOUS = "the device sections can be read in more than one way"


def split_or_why(data: bytes) -> tuple[DeviceSection, ...] | str:
    try:
        return split_device_state(data)
    except DataError as error:
        return error.what.partition(" (at")[0]


@settings(deadline=None, max_examples=300)
@given(sections(wild=True))
def test_sections_are_found_by_their_footers(devices: tuple[DeviceSection, ...]) -> None:
    """Found exactly, or, where a payload imitates sections, refused; never cut wrongly."""
    data = writer.stream_header() + b"".join(d.raw for d in devices) + writer.eof()
    assert split_or_why(data) in (devices, AMBIGUOUS)


@settings(deadline=None, max_examples=300)
@given(sections(), st.data())
def test_imitated_sections_change_no_byte_and_no_section_that_we_look_into(
    devices: tuple[DeviceSection, ...], data: st.DataObject
) -> None:
    """One device's payload holds a copy of other sections and footers of this state."""
    if not devices:
        return
    devices = (*devices, make_global_state("running", section_id=0x70000000))
    parts = [d.raw for d in devices] + [d.raw[-5:] for d in devices] + [b"x"]
    fake = b"".join(data.draw(st.lists(st.sampled_from(parts), max_size=6)))
    victim = data.draw(st.integers(0, len(devices) - 2))
    old = devices[victim]
    changed = make_section(
        section_id=old.section_id,
        idstr=old.idstr,
        instance_id=old.instance_id,
        version_id=old.version_id,
        payload=fake,
    )
    expected = (*devices[:victim], changed, *devices[victim + 1 :])
    stream = writer.stream_header() + b"".join(d.raw for d in expected) + writer.eof()
    found = split_or_why(stream)
    if found == AMBIGUOUS:
        return
    assert not isinstance(found, str), found
    assert b"".join(d.raw for d in found) == b"".join(d.raw for d in expected)
    assert [d for d in found if is_essential(d.idstr)] == [expected[-1]]
