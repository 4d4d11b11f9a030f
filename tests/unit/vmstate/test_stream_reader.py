"""The reader: each kind of section and record, and each thing that it must refuse."""

from __future__ import annotations

import io
import zlib
from struct import pack

import pytest

from stillframe.errors import DataError
from stillframe.vmstate import writer
from stillframe.vmstate.reader import StreamReader
from stillframe.vmstate.records import (
    Command,
    Configuration,
    Description,
    Device,
    Eof,
    Event,
    Header,
    Pages,
    RamBlocks,
    StreamBlock,
    ZeroRun,
)
from stillframe.vmstate.source import StreamSource
from tests.support import stream_build as sb
from tests.support.stream_build import PAGE, Pipe, device, read, start, word
from tests.support.stream_summary import BlockSummary, verify_stream

A, B = b"A" * PAGE, b"B" * PAGE
TWO = (("ram0", 4 * PAGE), ("rom", PAGE))


def refused(data: bytes, message: str | None, **options: object) -> DataError:
    with pytest.raises(DataError, match=message) as caught:
        read(data, **options)
    assert caught.value.offset_bytes is not None
    assert 0 <= caught.value.offset_bytes <= len(data)
    return caught.value


def pages(data: bytes, **options: object) -> list[Event]:
    return [e for e in read(data, **options) if isinstance(e, Pages | ZeroRun)]


# The whole stream


def test_a_whole_stream_in_order() -> None:
    early_payload = pack(">QQQIQ", 0, 140 << 20, 2 << 20, 0, 0) + bytes(16)
    early = device(40, "0000:00:04.0/virtio-mem-device-early", early_payload)
    devices = (device(0, "timer", b"t"), device(4, "cpu", b"c" * 99))
    data = (
        sb.head()
        + writer.ram_start_section(TWO, section_id=2)
        + early.raw
        + writer.ram_part_prefix(2)
        + writer.ram_page_record(0, A, block="ram0")
        + writer.ram_page_record(PAGE, B, block=None)
        + writer.ram_zero_record(2 * PAGE, block=None)
        + writer.ram_zero_record(3 * PAGE, block=None)
        + writer.ram_part_suffix(2)
        + writer.ram_part_prefix(2)
        + writer.ram_page_record(0, A, block="rom")
        + writer.ram_part_suffix(2)
        + writer.ram_end_section(2)
        + sb.tail(devices)
    )
    events = read(data)
    assert events[:-1] == [
        Header(version=3),
        Configuration(name="pc-q35-7.2"),
        RamBlocks(
            blocks=(
                StreamBlock(idstr="ram0", used_length_bytes=4 * PAGE),
                StreamBlock(idstr="rom", used_length_bytes=PAGE),
            )
        ),
        Device(early),
        Pages(0, 0, A),
        Pages(0, PAGE, B),
        ZeroRun(0, 2 * PAGE, 2),
        Pages(1, 0, A),
        Device(devices[0]),
        Device(devices[1]),
        Eof(),
    ]
    last = events[-1]
    assert isinstance(last, Description)
    assert last.sizes_agree is True
    summary = verify_stream(io.BytesIO(data))
    assert summary.stream_bytes == len(data)
    assert summary.machine_type == "pc-q35-7.2"
    assert summary.blocks == (
        BlockSummary(idstr="ram0", used_length_bytes=4 * PAGE, pages=4, data_pages=2, zero_pages=2),
        BlockSummary(idstr="rom", used_length_bytes=PAGE, pages=1, data_pages=1, zero_pages=0),
    )
    assert summary.devices == (early.idstr, "timer", "cpu")
    assert summary.has_description
    for piece in (1, 7, 4097):
        assert list(StreamReader(Pipe(data, piece)).events()) == events


def test_every_truncation_is_refused() -> None:
    data = sb.ram_stream(
        writer.ram_page_record(0, A, block="ram0") + writer.ram_zero_record(PAGE, block=None)
    )
    full = len(data) - len(sb.tail(())) + 1
    for size in range(len(data)):
        if size == full:
            continue  # ends right after EOF: a stream without a description
        refused(data[:size], None)


def test_something_after_the_end() -> None:
    data = sb.ram_stream(b"")
    for more in (b"\0", b"x", b"}", data):
        refused(data + more, None)


@pytest.mark.parametrize(
    ("begin", "name"),
    [
        (b"\x28\xb5\x2f\xfd", "zstd"),
        (b"\x1f\x8b\x08\0", "gzip"),
        (b"\x11\x22\x33\x44", "multifd channel"),
        (b"\x16\x03\x01\x02", "TLS"),
        (b"QFI\xfb", "qcow2"),
        (b"QEVM\0\0\0\2", "version 2"),
        (b"QEVM\0\0\0\4", "version 4"),
        (b"abcd\0\0\0\3", "not a migration stream"),
    ],
)
def test_not_a_stream(begin: bytes, name: str) -> None:
    refused(begin + bytes(100), name)


@pytest.mark.parametrize("kind", [0x05, 0x06, 0x07, 0x09, 0x7E, 0xFF])
def test_unknown_section(kind: int) -> None:
    ram = writer.ram_start_section(TWO, section_id=2)
    refused(sb.head() + ram + bytes((kind,)) + bytes(50), "unknown section type")


def test_source_that_fails() -> None:
    class Broken(io.RawIOBase):
        def read(self, size: int = -1) -> bytes:
            raise OSError(5, "Input/output error")

    with pytest.raises(DataError, match="cannot be read"):
        list(StreamReader(Broken()).events())


# Configuration


def test_configuration_subsections() -> None:
    data = sb.configuration(
        "virt-7.2",
        sb.subsection("target-page-bits", pack(">I", 12)),
        sb.capabilities("x-ignore-shared"),
        sb.subsection("uuid", bytes(range(16))),
    ) + sb.tail(())
    assert read(data)[1] == Configuration(
        name="virt-7.2",
        capabilities=("x-ignore-shared",),
        target_page_bits=12,
        uuid=bytes(range(16)),
    )


def test_larger_target_pages() -> None:
    big = 1 << 16
    data = (
        sb.configuration("virt-9.0", sb.subsection("target-page-bits", pack(">I", 16)))
        + writer.ram_start_section((("ram", 2 * big),), section_id=2)
        + sb.part(
            word(0, 8) + sb.name("ram") + b"x" * big + word(big, 0x22) + b"\0"
        )
        + sb.tail(())
    )  # fmt: skip
    assert pages(data) == [Pages(0, 0, b"x" * big), ZeroRun(0, big, 1)]


@pytest.mark.parametrize(
    ("subsections", "message"),
    [
        ((sb.subsection("target-page-bits", pack(">I", 40)),), "not possible"),
        ((sb.subsection("unheard-of", b""),), "unknown subsection"),
        ((sb.capabilities("multifd"),), "'multifd', which is not known"),
        ((sb.subsection("capabilities", pack(">I", 1 << 31)),), "claims"),
        ((sb.subsection("uuid", bytes(16)),) * 2, "twice"),
        ((sb.subsection("uuid", bytes(16), version=2),), "unknown version"),
        ((b"\x05\x02\xff\xff",), "not a name"),
    ],
)
def test_configuration_refused(subsections: tuple[bytes, ...], message: str) -> None:
    refused(sb.configuration("m", *subsections) + sb.tail(()), message)


@pytest.mark.parametrize("length", [0, 256, 0xFFFFFFFF])
def test_machine_name_length(length: int) -> None:
    refused(writer.stream_header() + b"\x07" + pack(">I", length) + b"x" * 300, "name has")


# Block list


@pytest.mark.parametrize(
    ("payload", "message"),
    [
        (word(2 * PAGE, 4) + (sb.name("a") + pack(">Q", PAGE)) * 2, "twice"),
        (word(PAGE, 4) + sb.name("a") + pack(">Q", 2 * PAGE), "impossible length"),
        (word(PAGE, 4) + sb.name("a") + pack(">Q", 0), "impossible length"),
        (word(PAGE, 4) + sb.name("a") + pack(">Q", 100), "impossible length"),
        (word(0, 4), "claims 0 bytes"),
        (word(1 << 60, 4), "claims"),
        (word(PAGE, 4) + b"\0" + pack(">Q", PAGE), "not a name"),
        (word(PAGE, 4) + b"\1\xff" + pack(">Q", PAGE), "not a name"),
        (word(0, 0x10), "does not start with the list"),
        (word(PAGE, 0x24), "does not start with the list"),
    ],
)
def test_block_list_refused(payload: bytes, message: str) -> None:
    refused(sb.head() + start(payload) + bytes(40), message)


def test_too_many_blocks() -> None:
    entries = b"".join(sb.name(f"b{i}") + pack(">Q", PAGE) for i in range(5000))
    refused(sb.head() + start(word(5000 * PAGE, 4) + entries), "more than 4096")


def test_ignored_shared_blocks_have_an_address() -> None:
    data = (
        sb.configuration("m", sb.capabilities("x-ignore-shared"))
        + start(
            word(2 * PAGE, 4)
            + sb.name("a") + pack(">QQ", PAGE, 0xFD000000)
            + sb.name("b") + pack(">QQ", PAGE, 0) + word(0, 0x10)
        )
        + sb.tail(())
    )  # fmt: skip
    blocks = read(data)[2]
    assert isinstance(blocks, RamBlocks)
    assert [b.address for b in blocks.blocks] == [0xFD000000, 0]


def test_postcopy_page_sizes() -> None:
    """With postcopy advised, only blocks of other pages than the host's have a size."""
    data = (
        sb.head()
        + b"\x08\0\3\0\x10" + bytes(16)
        + start(
            word(1030 * PAGE, 4)
            + sb.name("a") + pack(">Q", PAGE)
            + sb.name("huge") + pack(">QQ", 1024 * PAGE, 2 << 20)
            + sb.name("b") + pack(">Q", PAGE)
            + sb.name("last") + pack(">QQ", 4 * PAGE, 1 << 14) + word(0, 0x10)
        )
        + sb.tail(())
    )  # fmt: skip
    blocks = next(e for e in read(data) if isinstance(e, RamBlocks))
    assert [b.page_size_bytes for b in blocks.blocks] == [None, 2 << 20, None, 1 << 14]
    refused(data.replace(pack(">Q", 2 << 20), pack(">Q", 3 << 20)), "impossible page size")


def test_postcopy_without_page_sizes() -> None:
    advice = b"\x08\0\3\0\x10" + bytes(16)
    data = sb.head() + advice + writer.ram_start_section(TWO, section_id=2) + sb.tail(())
    blocks = next(e for e in read(data) if isinstance(e, RamBlocks))
    assert [b.page_size_bytes for b in blocks.blocks] == [None, None]


def test_postcopy_with_ignored_shared_memory_is_refused() -> None:
    advice = b"\x08\0\3\0\x10" + bytes(16)
    begin = sb.configuration("m", sb.capabilities("x-ignore-shared")) + advice
    refused(begin + writer.ram_start_section(TWO, section_id=2), "which no QEMU does together")


# RAM records


@pytest.mark.parametrize(
    ("payload", "message"),
    [
        (word(PAGE, 0x28) + A, "does not name its RAM block"),
        (word(0, 8) + sb.name("nope") + A, "unknown RAM block 'nope'"),
        (word(4 * PAGE, 8) + sb.name("ram0") + A, "beyond the end"),
        (word(0, 8) + sb.name("ram0") + A + word(4 * PAGE, 0x28) + A, "beyond the end"),
        (word(1 << 63, 2) + sb.name("ram0") + b"\0", "beyond the end"),
        (word(0, 2) + sb.name("ram0") + b"\7", "filled with 7"),
        (word(0, 2) + sb.name("ram0") + b"\0" + word(PAGE, 0x22) + b"\1", "filled with 1"),
        (word(0, 0x0A) + sb.name("ram0"), "malformed"),
        (word(0, 0x400) + sb.name("ram0"), "malformed"),
        (word(0, 0x20), "malformed"),
        (word(0, 0), "malformed"),
        (word(PAGE, 0x10), "malformed"),
        (word(PAGE, 4), "malformed"),
        (word(0, 0x80), "RDMA"),
        (word(0, 0x200), "multifd"),
        (word(0, 0x01), "2009"),
        (word(0, 0x100) + sb.name("ram0") + pack(">I", 1 << 31), "compressed page has"),
        (word(0, 0x100) + sb.name("ram0") + pack(">I", 9) + b"x" * 9, "damaged"),
        (word(0, 0x40) + sb.name("ram0") + b"\2\0\2\0\0", "encoding 2"),
        (word(0, 0x40) + sb.name("ram0") + b"\1\xff\xff", "65535 bytes"),
        (word(0, 0x40) + sb.name("ram0") + b"\1\0\4\0\2hi", "XBZRLE pages, which change"),
    ],
)
def test_ram_record_refused(payload: bytes, message: str) -> None:
    refused(sb.ram_stream(payload), message)


def test_pages_of_the_same_block_again() -> None:
    """CONTINUE goes on across sections, and runs end where addresses jump."""
    data = (
        sb.head()
        + writer.ram_start_section(TWO, section_id=2)
        + sb.part(
            writer.ram_page_record(0, A, block="ram0")
            + writer.ram_page_record(PAGE, B, block=None)
            + writer.ram_page_record(2 * PAGE, B, block=None)
            + writer.ram_page_record(PAGE, A, block=None)
        )
        + sb.part(writer.ram_zero_record(PAGE, block=None), kind=3)
        + sb.tail(())
    )
    assert pages(data) == [
        Pages(0, 0, A),
        Pages(0, PAGE, B + B),
        Pages(0, PAGE, A),
        ZeroRun(0, PAGE, 1),
    ]


def test_long_runs_are_cut() -> None:
    count = 700
    records = b"".join(
        writer.ram_page_record(i * PAGE, A, block=None if i else "ram0") for i in range(count)
    )
    runs = pages(sb.ram_stream(records, blocks=[("ram0", count * PAGE)]))
    assert all(isinstance(r, Pages) and len(r.data) <= 1 << 20 for r in runs)
    assert sb.replay(read(sb.ram_stream(records, blocks=[("ram0", count * PAGE)]))) == {
        "ram0": A * count
    }


def test_compressed_pages() -> None:
    packed = zlib.compress(A + b"")
    records = word(0, 0x100) + sb.name("ram0") + pack(">I", len(packed)) + packed
    records += word(PAGE, 0x120) + pack(">I", len(packed)) + packed
    assert pages(sb.ram_stream(records)) == [Pages(0, 0, A), Pages(0, PAGE, A)]
    for wrong in (zlib.compress(A[1:]), zlib.compress(A + b"A"), packed[:-1], packed + b"x"):
        records = word(0, 0x100) + sb.name("ram0") + pack(">I", len(wrong)) + wrong
        refused(sb.ram_stream(records), "damaged")


def test_compression_bomb() -> None:
    bomb = zlib.compress(bytes(4_000_000))
    assert len(bomb) < 4110
    refused(
        sb.ram_stream(word(0, 0x100) + sb.name("ram0") + pack(">I", len(bomb)) + bomb), "exactly"
    )


def test_xbzrle_asks_for_the_page_before() -> None:
    asked = []

    def lookup(block_index: int, offset_bytes: int) -> bytes:
        asked.append((block_index, offset_bytes))
        return A

    delta = b"\x02\x03xyz"
    record = word(PAGE, 0x40) + sb.name("ram0") + b"\1" + pack(">H", len(delta)) + delta
    assert pages(sb.ram_stream(record), page_lookup=lookup) == [Pages(0, PAGE, b"AAxyz" + A[5:])]
    assert asked == [(0, PAGE)]
    refused(sb.ram_stream(record), "capability xbzrle")
    refused(sb.ram_stream(record), "did not come before", page_lookup=lambda *_: b"")


def test_data_pages_that_went_elsewhere() -> None:
    """Multifd up to QEMU 8.0: only zero pages are in the main stream."""
    zero = writer.ram_zero_record(PAGE, block="ram0")
    refused(sb.ram_stream(zero), "multifd")
    pages(sb.ram_stream(zero + writer.ram_page_record(0, A, block=None)))
    pages(sb.ram_stream(b""))


# Sections


def test_parts_without_start() -> None:
    refused(sb.head() + sb.part(b""), "without its start")
    other = sb.head() + writer.ram_start_section(TWO, section_id=2) + sb.part(b"", section_id=3)
    refused(other, "part of section 3")


def test_start_sections_refused() -> None:
    once = writer.ram_start_section(TWO, section_id=2)
    refused(sb.head() + once + once, "starts twice")
    refused(sb.head() + once.replace(b"\x03ram", b"\x03rom"), "section 'rom' in several parts")
    refused(sb.head() + once.replace(pack(">II", 0, 4), pack(">II", 0, 3)), "version 3")
    refused(sb.head() + start(b"", section_id=0), "unknown form")


def test_footers() -> None:
    good = sb.head() + writer.ram_start_section(TWO, section_id=2)
    refused(good[:-1] + b"\x09" + sb.part(b"") + sb.tail(()), "footer has id 9")
    lost = sb.part(b"")[:-5]
    refused(good + lost + sb.tail(()), "no footer")


def test_without_footers_the_description_tells_the_lengths() -> None:
    devices = (device(0, "timer", b"t" * 24), device(4, "cpu", b"c" * 99))
    ram = start(
        word(PAGE, 4) + sb.name("a") + pack(">Q", PAGE) + word(0, 0x10), footer=False
    ) + sb.part(b"")[:-5]  # fmt: skip
    bare = b"".join(d.raw[:-5] for d in devices)
    description = sb.tail(devices).removeprefix(b"".join(d.raw for d in devices))
    events = read(sb.head() + ram + bare + description)
    assert [e.section.payload for e in events if isinstance(e, Device)] == [b"t" * 24, b"c" * 99]


def test_without_footers_headers_tell_the_lengths() -> None:
    """Streams of machine types up to 2.2 have no description either."""
    devices = (device(0, "timer", b"t" * 24), device(4, "cpu", b"c" * 99))
    ram = start(
        word(PAGE, 4) + sb.name("a") + pack(">Q", PAGE) + word(0, 0x10), footer=False
    ) + sb.part(b"")[:-5]  # fmt: skip
    bare = b"".join(d.raw[:-5] for d in devices)
    events = read(sb.head() + ram + bare + b"\0")
    assert [e.section.payload for e in events if isinstance(e, Device)] == [b"t" * 24, b"c" * 99]


def test_description_that_does_not_fit_is_told() -> None:
    devices = (device(0, "timer", b"t" * 24), device(4, "cpu", b"c" * 99))
    other = (device(0, "timer", b"t" * 23), devices[1])
    data = sb.head() + b"".join(d.raw for d in devices)
    data += sb.tail(other).removeprefix(b"".join(d.raw for d in other))
    events = read(data)
    assert events[-1] == Description(text=events[-1].text, sizes_agree=False)  # type: ignore[union-attr]
    assert [e.section for e in events if isinstance(e, Device)] == list(devices)


def test_description_settles_what_footers_leave_open() -> None:
    planted = b"\x7e\0\0\0\x05" + device(6, "cpu").raw[:-5]
    devices = (device(5, "a", planted), device(6, "b"), device(7, "c"))
    described = read(sb.head() + sb.tail(devices))
    assert [e.section for e in described if isinstance(e, Device)] == list(devices)
    refused(sb.head() + sb.tail(devices, described=False), "more than one way")


def described(devices: list[dict[str, object]]) -> bytes:
    return writer.eof() + writer.vmdescription({"page_size": 4096, "devices": devices})


def test_description_with_arrays_and_subsections() -> None:
    """An array is described by its first element; a subsection's header counts too."""
    inner = b"\x05\x03a/x\0\0\0\1" + b"X"
    outer = b"\x05\x03a/y\0\0\0\1" + b"YY" + inner
    section = device(3, "a", b"12344444" + outer)
    fields = [{"name": "n", "size": 2, "array_len": 4, "type": "uint16"}]
    nested = {"vmsd_name": "a/x", "version": 1, "fields": [{"name": "x", "size": 1}]}
    subsection = {
        "vmsd_name": "a/y",
        "version": 1,
        "fields": [{"name": "y", "size": 2}],
        "subsections": [nested],
    }
    entry = {"name": "a", "instance_id": 0, "fields": fields, "subsections": [subsection]}
    data = sb.head() + section.raw + described([entry])
    assert [type(e) for e in read(data)[2:]] == [Device, Eof, Description]
    assert read(data)[-1].sizes_agree is True  # type: ignore[union-attr]


@pytest.mark.parametrize("size", [-5, -9, 1 << 62, 2])
def test_description_with_absurd_sizes(size: int) -> None:
    section = device(3, "a", b"xyz")
    fields = [{"name": "x", "size": size}]
    entry = {"name": "a", "instance_id": 0, "fields": fields}
    events = read(sb.head() + section.raw + described([entry]))
    assert Device(section) in events
    assert events[-1].sizes_agree is False  # type: ignore[union-attr]


def test_same_device_twice() -> None:
    """As the user networks of QEMU up to 7.2 are: told apart by their order."""
    twice = (device(3, "a", b"xyz"), device(4, "a", b"wxyz"))
    entries = [
        {"name": "a", "instance_id": 0, "fields": [{"name": "x", "size": size}]} for size in (3, 4)
    ]
    for count, agrees in ((2, True), (1, False)):
        data = sb.head() + twice[0].raw + twice[1].raw + described(entries[:count])
        *events, description = read(data)
        assert [e.section for e in events if isinstance(e, Device)] == list(twice)
        assert isinstance(description, Description)
        assert description.sizes_agree is agrees


def test_same_section_id_twice() -> None:
    twice = device(3, "a", b"xyz").raw + device(3, "b", b"xyz").raw + device(4, "c").raw
    (first, _) = (e.section for e in read(sb.head() + twice + b"\0") if isinstance(e, Device))
    assert first.payload.endswith(b"xyz")
    other = device(3, "a").raw + device(4, "b").raw + device(3, "c").raw
    (only,) = (e.section for e in read(sb.head() + other + b"\0") if isinstance(e, Device))
    assert only.raw == other


def test_one_footer_missing() -> None:
    devices = (device(0, "timer", b"t" * 24), device(4, "cpu", b"c" * 99), device(5, "b"))
    whole = sb.tail(devices)
    refused(sb.head() + whole.replace(devices[1].raw, devices[1].raw[:-5]), "does not end")


def test_rest_has_a_limit() -> None:
    source = StreamSource(Pipe(bytes(5000), 1000))
    source.take(1000, "the beginning")
    assert len(source.rest(4000, "the rest")) == 4000
    source = StreamSource(Pipe(bytes(5000), 1000))
    with pytest.raises(DataError, match="larger than 4999"):
        source.rest(4999, "the rest")


def test_device_limit() -> None:
    devices = (device(0, "big", bytes(100_000)),)
    data = sb.head() + sb.tail(devices)
    read(data, device_limit_bytes=101_000)
    refused(data, "larger than 99000", device_limit_bytes=99_000)
    endless = Pipe(sb.head() + devices[0].raw + bytes(80 << 20))
    with pytest.raises(DataError, match="larger than"):
        list(StreamReader(endless, device_limit_bytes=1000).events())


# Early sections


@pytest.mark.parametrize(
    ("payload", "message"),
    [
        (pack(">QQQIQ", 0, 1 << 60, 1, 0, 0), "impossible size"),
        (pack(">QQQIQ", 0, 1 << 30, 0, 0, 0), "impossible size"),
        (pack(">QQQIQ", 0, 1 << 30, 2 << 20, 0, 0) + bytes(72), "no footer"),
        (b"", "truncated"),
    ],
)
def test_early_section_refused(payload: bytes, message: str) -> None:
    early = device(40, "x/virtio-mem-device-early", payload)
    refused(sb.head() + early.raw, message)


# Commands


def test_informing_commands() -> None:
    data = sb.head() + b"\x08\0\1\0\0" + b"\x08\0\2\0\4\0\0\0\1" + b"\x08\0\x0b\0\0" + sb.tail(())
    assert [e for e in read(data) if isinstance(e, Command)] == [
        Command(1, b""),
        Command(2, b"\0\0\0\1"),
        Command(11, b""),
    ]


@pytest.mark.parametrize(
    ("code", "name"),
    [
        (4, "POSTCOPY_LISTEN"),
        (5, "POSTCOPY_RUN"),
        (6, "POSTCOPY_RAM_DISCARD"),
        (7, "PACKAGED"),
        (8, "ENABLE_COLO"),
        (9, "POSTCOPY_RESUME"),
        (10, "RECV_BITMAP"),
        (12, "unknown command 12"),
        (0, "unknown command 0"),
    ],
)
def test_commands_refused(code: int, name: str) -> None:
    refused(sb.head() + b"\x08" + pack(">HH", code, 4) + bytes(40), name)


@pytest.mark.parametrize(("code", "length"), [(1, 1), (2, 3), (3, 8), (11, 65535)])
def test_command_lengths(code: int, length: int) -> None:
    refused(sb.head() + b"\x08" + pack(">HH", code, length) + bytes(40), "bytes of data")


def test_endless_commands_and_early_sections() -> None:
    refused(sb.head() + b"\x08\0\1\0\0" * 70_000, "more than 65536 commands")
    payload = pack(">QQQIQ", 0, 2 << 20, 2 << 20, 0, 0) + bytes(8)
    early = device(40, "x/virtio-mem-device-early", payload)
    refused(sb.head() + early.raw * 5000, "more than 4096 early")


# Description


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (b"{}", "malformed"),
        (b'{"devices": 7}', "malformed"),
        (b'{"devices": [{"name": "a"}]}', "malformed"),
        (b"{" + b'"a":{' * 200_000 + b"}", "malformed"),
        (b"{\xff}", "malformed"),
        (b"[1, 2]", "not a JSON object"),
        (b"", None),
    ],
)
def test_description_refused(text: bytes, message: str | None) -> None:
    refused(sb.head() + b"\0\x06" + pack(">I", len(text)) + text, message)


def test_description_without_devices() -> None:
    events = read(sb.head() + b"\0" + writer.vmdescription({"page_size": 4096, "devices": []}))
    assert events[-2:] == [
        Eof(),
        Description(text=b'{"page_size": 4096, "devices": []}', sizes_agree=True),
    ]


@pytest.mark.parametrize("size", [6, 7, 0x606, 0x2020, 0x60606, 0x200006])
def test_description_of_any_length_is_found(size: int) -> None:
    """Its length's bytes may look like text or like its own type byte."""
    text = b'{"devices": [], "x": "'
    text = text.ljust(max(size, len(text) + 2) - 2, b"x") + b'"}'
    assert read(sb.head() + b"\0\x06" + pack(">I", len(text)) + text)[-1] == Description(
        text=text, sizes_agree=True
    )
