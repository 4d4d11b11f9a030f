"""Small snapshots, made with the real writer."""

from __future__ import annotations

import random
from collections.abc import Iterable, Sequence

from stillframe.model import BlockRecord, Manifest
from stillframe.still.frames import LEVEL_DEFAULT
from stillframe.still.index import KIND_DATA, KIND_ZERO, PageRun
from stillframe.still.sinks import Sink
from stillframe.still.snapshot import Snapshot
from stillframe.still.writer import SnapshotWriter
from stillframe.vmstate import devices, writer
from tests.support_store.memory import MemorySink, MemorySource

PAGE = 4096
RAM_ID = 2
BLOCKS = (("pc.ram", 64 * PAGE), ("0000:00:01.0/vga.vram", 16 * PAGE), ("pc.bios", 3 * PAGE))

Piece = tuple[int, int, Sequence[bytes | None]]
"""Block number, first page, contents (None: a zero page)."""


def block_records(blocks: Iterable[tuple[str, int]] = BLOCKS) -> tuple[BlockRecord, ...]:
    return tuple(
        BlockRecord(idstr=name, used_length_bytes=size, page_size_bytes=PAGE)
        for name, size in blocks
    )


def manifest(blocks: Iterable[tuple[str, int]] = BLOCKS, **fields: object) -> Manifest:
    values: dict[str, object] = {
        "created": "2026-01-02T03:04:05Z",
        "mode": "background",
        "stillframe_version": "0.1.0",
        "stream_bytes": 0,
        "blocks": block_records(blocks),
    }
    return Manifest(**(values | fields))  # type: ignore[arg-type]


def head(blocks: Sequence[tuple[str, int]] = BLOCKS) -> bytes:
    """The stream up to RAM's START section."""
    return (
        writer.stream_header()
        + writer.configuration_section("pc-q35-7.2")
        + writer.ram_start_section(blocks, section_id=RAM_ID)
    )


def tail(payload: bytes = b"state of a device", *more: devices.DeviceSection) -> bytes:
    """The stream from the first device section on."""
    section = devices.make_section(
        section_id=9, idstr="timer", instance_id=0, version_id=2, payload=payload
    )
    sections = [section, *more]
    description = devices.describe(sections, target_page_bytes=PAGE)
    return b"".join(s.raw for s in sections) + writer.eof() + writer.vmdescription(description)


def clock(below_bytes: int, above_bytes: int = 0) -> devices.DeviceSection:
    """A PC's real-time clock, whose CMOS tells how much RAM is below and above 4 GiB."""
    cmos = bytearray(245)
    cmos[0x30:0x32] = min((below_bytes - (1 << 20)) >> 10, 0xFFFF).to_bytes(2, "little")
    cmos[0x34:0x36] = (max(below_bytes - (16 << 20), 0) >> 16).to_bytes(2, "little")
    cmos[0x5B:0x5E] = (above_bytes >> 16).to_bytes(3, "little")
    return devices.make_section(
        section_id=10, idstr="mc146818rtc", instance_id=0, version_id=3, payload=bytes(cmos)
    )


def ram_frame(
    pieces: Iterable[Piece], blocks: Sequence[tuple[str, int]] = BLOCKS
) -> tuple[bytes, list[PageRun]]:
    """One whole RAM part, and its runs."""
    out = bytearray(writer.ram_part_prefix(RAM_ID))
    runs: list[PageRun] = []
    current = -1
    for block, first_page, contents in pieces:
        for number, content in enumerate(contents, first_page):
            kind = KIND_ZERO if content is None else KIND_DATA
            named = blocks[block][0] if block != current else None
            last = runs[-1] if runs and named is None else None
            if last and last.kind == kind and last.first_page + last.pages == number:
                runs[-1] = last._replace(pages=last.pages + 1)
            else:
                runs.append(PageRun(block, number, 1, kind, len(out)))
            if content is None:
                out += writer.ram_zero_record(number * PAGE, block=named)
            else:
                out += writer.ram_page_record(number * PAGE, content, block=named)
            current = block
    return bytes(out + writer.ram_part_suffix(RAM_ID)), runs


def random_ram(
    seed: int, blocks: Sequence[tuple[str, int]] = BLOCKS
) -> dict[tuple[int, int], bytes | None]:
    """Contents of every page, about half of them zero."""
    rng = random.Random(seed)
    return {
        (block, page): rng.randbytes(64) * (PAGE // 64) if rng.random() < 0.5 else None
        for block, (_, size) in enumerate(blocks)
        for page in range(size // PAGE)
    }


def write_ram(
    snapshot_writer: SnapshotWriter,
    ram: dict[tuple[int, int], bytes | None],
    *,
    pages_per_frame: int = 20,
    order: Sequence[tuple[int, int]] | None = None,
    blocks: Sequence[tuple[str, int]] = BLOCKS,
) -> bytes:
    """Write pages in frames, in the given order; returns the raw RAM part of the stream."""
    places = list(order or ram)
    stream = b""
    for start in range(0, len(places), pages_per_frame):
        raw, runs = ram_frame(
            [(b, p, [ram[b, p]]) for b, p in places[start : start + pages_per_frame]], blocks
        )
        snapshot_writer.append(snapshot_writer.encode(raw), runs)
        stream += raw
    return stream


def write_small(
    sink: Sink, *, seed: int = 1, level: int = LEVEL_DEFAULT, shuffled: bool = False
) -> tuple[str, bytes, dict[tuple[int, int], bytes | None]]:
    """A whole snapshot; returns its id, its stream and its RAM."""
    ram = random_ram(seed)
    order = list(ram)
    if shuffled:
        random.Random(seed).shuffle(order)
    with SnapshotWriter(sink, level=level) as w:
        w.append_stream(head())
        stream = head() + write_ram(w, ram, order=order) + tail()
        w.append_stream(tail())
        snapshot_id = w.finish(manifest())
    return snapshot_id, stream, ram


def small_file(seed: int = 1, *, level: int = LEVEL_DEFAULT, shuffled: bool = False) -> bytes:
    """The bytes of a small snapshot file."""
    sink = MemorySink()
    write_small(sink, seed=seed, level=level, shuffled=shuffled)
    return sink.content


def open_bytes(content: bytes) -> Snapshot:
    """A snapshot opened from bytes."""
    return Snapshot(MemorySource(content))
