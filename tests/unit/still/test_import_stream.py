"""Importing migration streams: rounds, odd parts, streams that are not whole VMs."""

from __future__ import annotations

import io
import json
import random
import struct
from datetime import UTC, datetime

import pytest

from stillframe.errors import DataError, SinkError
from stillframe.still.import_stream import RAM_SECTION_ID, import_stream
from stillframe.still.snapshot import Snapshot
from stillframe.vmstate import writer
from stillframe.vmstate.devices import make_section
from tests.support_store.faulty import FaultySink
from tests.support_store.memory import MemorySink
from tests.support_store.small import (
    BLOCKS,
    PAGE,
    clock,
    head,
    open_bytes,
    ram_frame,
    random_ram,
    small_file,
    tail,
)

A, B = b"A" * PAGE, b"B" * PAGE
FULL = ram_frame([(0, 0, [A] * 64), (1, 0, [None] * 16), (2, 0, [B, None, B])])[0]
TIMER = make_section(section_id=9, idstr="timer", instance_id=0, version_id=2, payload=b"state")


class Trickle(io.BytesIO):
    """A pipe that gives what it has: a few bytes at a time."""

    def read(self, size: int | None = -1, /) -> bytes:
        return super().read(min(size if size and size > 0 else 1000, 1000))


def imported(stream: bytes, **options: object) -> Snapshot:
    sink = MemorySink()
    source = Trickle(stream)
    import_stream(source, sink, stillframe_version="0.1.0", **options)  # type: ignore[arg-type]
    return open_bytes(sink.content)


def test_a_plain_stream() -> None:
    created = datetime(2026, 2, 3, 4, 5, 6, tzinfo=UTC)
    blocks = (("pc.ram", 2 << 20), *BLOCKS[1:])
    frame = ram_frame([(0, 0, [A] * 512), (1, 0, [None] * 16), (2, 0, [B, None, B])], blocks)[0]
    stream = head(blocks) + frame + tail(b"state of a device", clock(2 << 20))
    snapshot = imported(stream, created=created)
    report = snapshot.verify()
    assert (report.data_pages, report.zero_pages, report.missing_pages) == (514, 17, 0)
    assert snapshot.manifest.mode == "import"
    assert snapshot.manifest.created == "2026-02-03T04:05:06Z"
    assert snapshot.manifest.machine is None
    (part,) = snapshot.manifest.memory_map
    assert (part.gpa, part.length_bytes, part.idstr) == (0, 2 << 20, "pc.ram")
    assert snapshot.read_page("pc.bios", 2) == B
    skeleton = snapshot.skeleton()
    assert skeleton.configuration is not None
    assert skeleton.configuration.name == "pc-q35-7.2"
    assert skeleton.devices[0].payload == b"state of a device"
    assert skeleton.description is not None


def test_an_import_of_an_export_is_the_same_vm() -> None:
    original = open_bytes(small_file(5))
    again = imported(b"".join(original.iter_stream()))
    third = imported(b"".join(again.iter_stream()), created=datetime.now(UTC))
    for snapshot in (again, third):
        snapshot.verify()
        for name, size in BLOCKS:
            assert snapshot.read_range(name, 0, size) == original.read_range(name, 0, size)
    assert b"".join(again.iter_stream()) == b"".join(third.iter_stream())


@pytest.mark.parametrize("seed", range(5))
def test_rounds_of_a_live_migration(seed: int) -> None:
    """Pages come again in later rounds, in any order, changing between data and zero."""
    rng = random.Random(seed)
    stream, now = head() + FULL, {(0, page): A for page in range(64)}
    truth: dict[tuple[int, int], bytes | None] = dict(now)
    truth |= {(1, page): None for page in range(16)} | {(2, 0): B, (2, 1): None, (2, 2): B}
    for round_number in range(6):
        fresh = random_ram(seed * 100 + round_number)
        places = rng.sample(sorted(fresh), rng.randrange(1, 60))
        places.sort(reverse=rng.random() < 0.5)
        stream += ram_frame([(b, p, [fresh[b, p]]) for b, p in places])[0]
        truth |= {place: fresh[place] for place in places}
    snapshot = imported(stream + tail())
    report = snapshot.verify()
    assert report.missing_pages == 0
    assert report.superseded_pages > 0
    for (block, page), content in truth.items():
        assert snapshot.read_page(BLOCKS[block][0], page) == (content or bytes(PAGE))


def test_a_stream_larger_than_a_frame() -> None:
    blocks = (("pc.ram", 1200 * PAGE),)
    pages = [random.Random(n).randbytes(PAGE) if n % 7 else None for n in range(1200)]
    stream = head(blocks) + ram_frame([(0, 0, pages)], blocks)[0] + tail()
    snapshot = imported(stream)
    frames = [snapshot.index.frame(number) for number in range(snapshot.index.frame_count)]
    assert len(frames) == 7
    assert all(1 << 20 <= frame.raw_bytes < (1 << 20) + 2 * PAGE for frame in frames[1:4])
    again = imported(b"".join(snapshot.iter_stream()))
    assert list(again.index.frame_sizes()) == list(snapshot.index.frame_sizes())
    snapshot.verify()
    assert snapshot.read_range("pc.ram", 0, 1200 * PAGE) == b"".join(
        page or bytes(PAGE) for page in pages
    )


def test_millions_of_zero_pages_stay_small() -> None:
    size = 4 << 30
    blocks = (("pc.ram", size),)
    words = range(PAGE | 0x22, size | 0x22, PAGE)  # ZERO and CONTINUE
    records = writer.ram_part_prefix(2) + writer.ram_zero_record(0, block="pc.ram")
    records += b"".join(struct.pack(">QB", word, 0) for word in words)
    records += writer.ram_part_suffix(2)
    sink = MemorySink()
    stream = head(blocks) + records + ram_frame([(0, 9, [A])], blocks)[0]
    stream += tail(b"x", clock(2 << 30, 2 << 30))
    import_stream(io.BytesIO(stream), sink, stillframe_version="0.1.0")
    snapshot = open_bytes(sink.content)
    report = snapshot.verify()
    assert (report.zero_pages, report.data_pages) == (size // PAGE - 1, 1)
    assert snapshot.read_page("pc.ram", 9) == A
    below, above = snapshot.manifest.memory_map
    assert (below.length_bytes, above.gpa, above.length_bytes) == (2 << 30, 4 << 30, 2 << 30)
    assert snapshot.file_bytes < 4 << 20


def test_early_devices_stay_before_the_pages() -> None:
    early = make_section(
        section_id=5,
        idstr="0000:00:03.0/virtio-mem-device-early",
        instance_id=0,
        version_id=1,
        payload=struct.pack(">QQQIQQ", 4 << 30, 64 << 20, 2 << 20, 0, 2 << 20, 1),
    )
    stream = imported(head() + early.raw + FULL + tail()).iter_stream()
    assert early.raw in next(stream)


def test_a_missing_description_is_made() -> None:
    snapshot = imported(head() + FULL + TIMER.raw + writer.eof())
    description = snapshot.skeleton().description
    assert description is not None
    assert json.loads(description)["devices"][0]["fields"][0]["size"] == len(b"state")


def test_configuration_parts_that_the_loader_compares_are_kept() -> None:
    name = b"virt-7.2"
    bits = b"configuration/target-page-bits"
    uuid = b"configuration/uuid"
    configuration = (
        b"\x07"
        + len(name).to_bytes(4, "big")
        + name
        + b"\x05"
        + bytes([len(bits)])
        + bits
        + b"\0\0\0\1"
        + b"\0\0\0\x0c"
        + b"\x05"
        + bytes([len(uuid)])
        + uuid
        + b"\0\0\0\1"
        + bytes(range(16))
    )
    start = writer.ram_start_section(BLOCKS, section_id=2)
    stream = writer.stream_header() + configuration + start + FULL + tail()
    snapshot = imported(stream)
    assert b"".join(snapshot.iter_stream()).startswith(writer.stream_header() + configuration)
    assert snapshot.manifest.memory_map == ()


def test_a_command_of_newer_machines_is_kept() -> None:
    switchover = b"\x08\x00\x0b\x00\x00"
    ping = b"\x08\x00\x02\x00\x04abcd"
    content = b"".join(imported(head() + ping + FULL + switchover + tail()).iter_stream())
    assert switchover + TIMER.raw[:5] in content
    assert ping not in content


def _configuration_with_ignored_ram() -> bytes:
    name, section = b"pc-q35-7.2", b"configuration/capabilities"
    capability = b"x-ignore-shared"
    return (
        writer.stream_header()
        + b"\x07"
        + len(name).to_bytes(4, "big")
        + name
        + b"\x05"
        + bytes([len(section)])
        + section
        + b"\0\0\0\1"
        + b"\0\0\0\1"
        + bytes([len(capability)])
        + capability
    )


def _ram_start_with_addresses(blocks: tuple[tuple[str, int], ...]) -> bytes:
    plain = writer.ram_start_section(blocks, section_id=2)
    for name, size in blocks:
        entry = bytes([len(name)]) + name.encode() + size.to_bytes(8, "big")
        plain = plain.replace(entry, entry + bytes(8))
    return plain


def test_ram_that_was_left_out_is_refused() -> None:
    blocks = (("pc.ram", 4 * PAGE), ("pc.bios", 2 * PAGE))
    start = _configuration_with_ignored_ram() + _ram_start_with_addresses(blocks)
    bios = ram_frame([(1, 0, [A, None])], blocks)[0]
    with pytest.raises(DataError, match=r"leaves out RAM block 'pc\.ram'"):
        imported(start + bios + tail())
    ram = ram_frame([(0, 0, [A, B, None, A])], blocks)[0]
    assert imported(start + bios + ram + tail()).verify().missing_pages == 0


def test_a_block_without_pages_is_noted() -> None:
    stream = head() + ram_frame([(0, 0, [A] * 64), (2, 0, [B] * 3)])[0] + tail()
    snapshot = imported(stream)
    assert any("vga.vram" in note for note in snapshot.manifest.notes)
    assert snapshot.verify().missing_pages == 16


@pytest.mark.parametrize(
    ("stream", "complaint"),
    [
        (b"", "truncated"),
        (b"not a stream at all", "not a migration stream"),
        (head() + tail(), "holds no RAM"),
        (head() + FULL, "truncated"),
        (head() + FULL[:-9], "truncated"),
        (head() + FULL + TIMER.raw[:-3], "device"),
        (small_file(), "zstd"),
    ],
)
def test_what_is_not_a_whole_vm(stream: bytes, complaint: str) -> None:
    sink = FaultySink("")
    with pytest.raises(DataError, match=complaint):
        import_stream(Trickle(stream), sink, stillframe_version="0.1.0")
    assert sink.is_empty
    assert sink.calls[-1] == "abort"


def test_a_device_with_our_section_id_is_refused() -> None:
    odd = make_section(
        section_id=RAM_SECTION_ID, idstr="odd", instance_id=0, version_id=1, payload=b"x"
    )
    with pytest.raises(DataError, match="odd id"):
        imported(head() + FULL + odd.raw + writer.eof())


@pytest.mark.parametrize("script", ["E", "wE", "wwE"])
def test_a_full_disk(script: str) -> None:
    sink = FaultySink(script)
    with pytest.raises(SinkError, match="No space left"):
        import_stream(io.BytesIO(head() + FULL + tail()), sink, stillframe_version="0.1.0")
    assert sink.is_empty


def test_progress_is_told() -> None:
    seen: list[int] = []
    stream = head() + FULL + tail()
    imported(stream, progress=seen.append)
    assert seen == sorted(seen)
    assert seen[-1] == len(stream)
