"""RAM block ranges at file offsets, for raw and ELF exports."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from itertools import pairwise
from typing import Final, NamedTuple

from stillframe.errors import DataError, UsageError
from stillframe.still.index import KIND_DATA
from stillframe.still.pc_layout import NO_MAP
from stillframe.still.records import record_bytes
from stillframe.still.sinks import Sink, SparseSink
from stillframe.still.snapshot import Snapshot

_LENGTH_MAX_BYTES: Final = 1 << 46
_ZEROES: Final = bytes(1 << 20)
_PIPE_CACHE_BYTES: Final = 256 << 20


class Extent(NamedTuple):
    """A range of a block and its offset in the file."""

    file_offset: int
    idstr: str
    block_offset: int
    length_bytes: int


def physical_extents(snapshot: Snapshot) -> list[Extent]:
    """Return the validated memory map; file offsets are guest-physical addresses.

    Raises:
        UsageError: the manifest has no memory map.
        DataError: the map is impossible.
    """
    if not snapshot.manifest.memory_map:
        notes = snapshot.manifest.notes
        reason = next((n.removeprefix(NO_MAP) for n in notes if n.startswith(NO_MAP)), None)
        raise UsageError(
            "the snapshot has no guest-physical memory map",
            why=reason or "its stream does not hold it",
            remedy="export it block by block, as raw with --block",
        )
    extents: list[Extent] = []
    for part in snapshot.manifest.memory_map:
        size = snapshot.blocks[snapshot.block_number(part.idstr)].used_length_bytes
        if (
            part.length_bytes <= 0
            or not 0 <= part.offset_bytes <= size - part.length_bytes
            or not 0 <= part.gpa <= _LENGTH_MAX_BYTES - part.length_bytes
        ):
            raise DataError(f"the memory map has an impossible part at {part.gpa:#x}")
        extents.append(Extent(part.gpa, part.idstr, part.offset_bytes, part.length_bytes))
    extents.sort()
    for before, after in pairwise(extents):
        if before.file_offset + before.length_bytes > after.file_offset:
            raise DataError(f"the memory map's parts overlap at {after.file_offset:#x}")
    return extents


def write_extents(
    snapshot: Snapshot, sink: Sink, extents: Sequence[Extent], *, prefix: bytes = b""
) -> None:
    """Write a prefix and extents in file order, and commit the sink.

    A sparse sink gets no zero pages, and each frame is read once. A pipe gets everything in order.
    Pages that the snapshot does not hold are zero, as in a new VM.

    Raises:
        DataError: the snapshot is damaged.
        SinkError: the destination cannot take it.
    """
    try:
        if isinstance(sink, SparseSink):
            _write_sparse(snapshot, sink, extents, prefix)
        else:
            _write_in_order(snapshot, sink, extents, prefix)
        sink.commit()
    finally:
        sink.abort()


def _write_sparse(
    snapshot: Snapshot, sink: SparseSink, extents: Sequence[Extent], prefix: bytes
) -> None:
    sink.set_length(max([len(prefix), *(e.file_offset + e.length_bytes for e in extents)]))
    if prefix:
        sink.write_at(0, prefix)
    for idstr in dict.fromkeys(extent.idstr for extent in extents):
        wanted = [extent for extent in extents if extent.idstr == idstr]
        for run, content in snapshot.iter_runs(idstr):
            if content is None:
                continue
            page_bytes = snapshot.index.target_page_bytes
            data = _join(content, page_bytes)
            start = run.first_page * page_bytes
            for extent in wanted:
                first = max(start, extent.block_offset)
                end = min(start + len(data), extent.block_offset + extent.length_bytes)
                if first < end:
                    place = extent.file_offset + first - extent.block_offset
                    sink.write_at(place, data[first - start : end - start])


def _write_in_order(
    snapshot: Snapshot, sink: Sink, extents: Sequence[Extent], prefix: bytes
) -> None:
    # Pages saved on a fault are not in their neighbours' frames.
    snapshot.container.grow_cache(_PIPE_CACHE_BYTES)
    position = len(prefix)
    if prefix:
        sink.write(prefix)
    for extent in extents:
        _write_zeroes(sink, extent.file_offset - position)
        for start, data in _block_in_order(snapshot, extent):
            _write_zeroes(sink, extent.file_offset + start - max(position, extent.file_offset))
            sink.write(data)
            position = extent.file_offset + start + len(data)
        end = extent.file_offset + extent.length_bytes
        _write_zeroes(sink, end - max(position, extent.file_offset))
        position = end


def _write_zeroes(sink: Sink, length_bytes: int) -> None:
    while length_bytes > 0:
        part = min(length_bytes, len(_ZEROES))
        sink.write(memoryview(_ZEROES)[:part])
        length_bytes -= part


def _block_in_order(snapshot: Snapshot, extent: Extent) -> Iterator[tuple[int, memoryview]]:
    """Yield (offset in the extent, bytes) of its data pages in block order."""
    page_bytes = snapshot.index.target_page_bytes
    limit = extent.block_offset + extent.length_bytes
    for frame, run in snapshot.index.runs_of_block(snapshot.block_number(extent.idstr)):
        start = run.first_page * page_bytes
        first, end = max(start, extent.block_offset), min(start + run.pages * page_bytes, limit)
        if run.kind != KIND_DATA or first >= end:
            continue
        data = memoryview(_join(snapshot.run_content(frame, run, extent.idstr), page_bytes))
        yield first - extent.block_offset, data[first - start : end - start]


def _join(content: memoryview, page_bytes: int) -> bytes:
    """Return the pages of a run of data records, without the record headers."""
    stride = record_bytes(KIND_DATA, page_bytes)
    return b"".join(
        [content[start : start + page_bytes] for start in range(0, len(content), stride)]
    )
