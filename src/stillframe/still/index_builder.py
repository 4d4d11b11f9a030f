"""The building of an index from the runs of written frames."""

from __future__ import annotations

import struct
from array import array
from collections.abc import Iterable, Sequence
from heapq import heappop, heappush
from itertools import islice
from operator import add, le
from typing import Final

from stillframe.errors import DataError, InternalError
from stillframe.model import BlockRecord
from stillframe.still.frames import BytesLike, EncodedFrame
from stillframe.still.index import (
    KIND_DATA,
    WORD_BYTES,
    ZERO_RECORD_BYTES,
    BlockEntry,
    Columns,
    Index,
    PageRun,
    empty_columns,
)

PACKED_RUN: Final = struct.Struct("=IIQII")
"""A run as the native core passes it, in the host's byte order, 24 bytes: u32 block, u32 pages, u64
first_page, u32 kind, u32 raw_offset."""

_PAGE_BITS = 48
_WORDS_PER_RUN = PACKED_RUN.size // 4


def pack_runs(runs: Iterable[PageRun]) -> bytes:
    """Return the runs in packed form."""
    return b"".join(
        PACKED_RUN.pack(r.block, r.pages, r.first_page, r.kind, r.raw_offset) for r in runs
    )


class IndexBuilder:
    """The frames and their runs in file order. Not thread-safe."""

    def __init__(self) -> None:
        self._raw_bytes = array("I")
        self._stored_bytes = array("I")
        self._digests = bytearray()
        self._packed = bytearray()
        self._frames = array("I")

    @property
    def frame_count(self) -> int:
        return len(self._raw_bytes)

    def add_frame(self, frame: EncodedFrame, packed_runs: BytesLike) -> int:
        """Add a written frame; return its number.

        Raises:
            InternalError: ``packed_runs`` is not a whole number of packed runs.
        """
        length = memoryview(packed_runs).nbytes
        if length % PACKED_RUN.size:
            raise InternalError(f"{length} bytes are no whole number of packed runs")
        number = self.frame_count
        self._raw_bytes.append(frame.raw_bytes)
        self._stored_bytes.append(len(frame.data))
        self._digests += frame.digest
        self._packed += packed_runs
        self._frames.extend(array("I", (number,)) * (length // PACKED_RUN.size))
        return number

    def build(
        self, blocks: Sequence[BlockRecord], *, target_page_bytes: int, later_pages_win: bool
    ) -> Index:
        """Build the index of all frames so far.

        Args:
            later_pages_win: pages may occur repeatedly, and the last record counts. Each run's
                first record must then name its block.

        Raises:
            InternalError: the runs do not make a correct index; the snapshot would be wrong.
        """
        block_of, columns = self._sorted_columns()
        entries = _entries(block_of, blocks)
        if later_pages_win:
            entries, columns = _visible_only(entries, columns, target_page_bytes)
        try:
            return Index(
                target_page_bytes=target_page_bytes,
                blocks=entries,
                raw_bytes=self._raw_bytes,
                stored_bytes=self._stored_bytes,
                digests=bytes(self._digests),
                columns=columns,
            )
        except DataError as error:
            raise InternalError("the snapshot's pages do not add up", why=str(error)) from error

    def _sorted_columns(self) -> tuple[array[int], Columns]:
        """Return (block number of each row, columns), sorted by block and page, then by
        position."""
        packed = bytes(self._packed)
        words, longs = memoryview(packed).cast("I"), memoryview(packed).cast("Q")
        block_of = array("I", words[0::_WORDS_PER_RUN])
        columns = Columns(
            first_page=array("Q", longs[1 :: _WORDS_PER_RUN // 2]),
            pages=array("I", words[1::_WORDS_PER_RUN]),
            frame=self._frames,
            raw_offset=array("I", words[5::_WORDS_PER_RUN]),
            kind=_kinds(words[4::_WORDS_PER_RUN].tolist()),
        )
        if columns.first_page and max(columns.first_page) >> _PAGE_BITS:
            raise InternalError(f"page number {max(columns.first_page)} is beyond any block")
        keys = [b << _PAGE_BITS | p for b, p in zip(block_of, columns.first_page, strict=True)]
        if all(map(le, keys, islice(keys, 1, None))):
            return block_of, columns
        order = sorted(range(len(keys)), key=keys.__getitem__)
        block_of = array("I", map(block_of.__getitem__, order))
        return block_of, Columns(
            *(array(column.typecode, map(column.__getitem__, order)) for column in columns)
        )


def _kinds(kinds: list[int]) -> array[int]:
    if kinds and max(kinds) > KIND_DATA:
        raise InternalError(f"{max(kinds)} is not a kind of page")
    return array("B", kinds)


def _entries(block_of: array[int], blocks: Sequence[BlockRecord]) -> list[BlockEntry]:
    if block_of and block_of[-1] >= len(blocks):
        raise InternalError(f"block {block_of[-1]} is not in the manifest")
    counts = [0] * len(blocks)
    for number in range(len(blocks)):
        counts[number] = block_of.count(number)
    entries: list[BlockEntry] = []
    first = 0
    for block, count in zip(blocks, counts, strict=True):
        entries.append(BlockEntry(block.idstr, block.used_length_bytes, first, first + count))
        first += count
    return entries


def _visible_only(
    entries: Sequence[BlockEntry], columns: Columns, target_page_bytes: int
) -> tuple[list[BlockEntry], Columns]:
    """Drop pages that later records supersede."""
    out = empty_columns()
    kept: list[BlockEntry] = []
    for entry in entries:
        rows = slice(entry.first_run, entry.end_run)
        places = zip(columns.frame[rows], columns.raw_offset[rows], strict=True)
        ranks = [-(frame << 32 | raw_offset) for frame, raw_offset in places]
        first = len(out.pages)
        name_bytes = 1 + len(entry.idstr)
        for number, skip, pages in visible_pieces(
            columns.first_page[rows], columns.pages[rows], ranks
        ):
            row = entry.first_run + number
            kind = columns.kind[row]
            record = WORD_BYTES + target_page_bytes if kind == KIND_DATA else ZERO_RECORD_BYTES
            raw_offset = columns.raw_offset[row] + (name_bytes + skip * record if skip else 0)
            out.first_page.append(columns.first_page[row] + skip)
            out.pages.append(pages)
            out.frame.append(columns.frame[row])
            out.raw_offset.append(raw_offset)
            out.kind.append(kind)
        kept.append(entry._replace(first_run=first, end_run=len(out.pages)))
    return kept, out


def visible_pieces(
    starts: Sequence[int], pages: Sequence[int], ranks: Sequence[int]
) -> list[tuple[int, int, int]]:
    """Return the pieces of runs that no other run covers: (number of the run, pages skipped,
    pages).

    A sweep over the block's pages; the heap holds the runs that cover the current page.

    Args:
        starts: first page of each run, ascending.
        ranks: of overlapping runs, the one with the smallest rank is visible.
    """
    ends = array("Q", map(add, starts, pages))
    heap: list[tuple[int, int]] = []
    pieces: list[tuple[int, int, int]] = []
    upcoming, page = 0, 0
    while upcoming < len(starts) or heap:
        if not heap:
            page = max(page, starts[upcoming])
        while upcoming < len(starts) and starts[upcoming] <= page:
            heappush(heap, (ranks[upcoming], upcoming))
            upcoming += 1
        while heap and ends[heap[0][1]] <= page:
            heappop(heap)
        if not heap:
            continue
        top = heap[0][1]
        stop = ends[top] if upcoming == len(starts) else min(ends[top], starts[upcoming])
        skip = page - starts[top]
        if pieces and pieces[-1][0] == top and pieces[-1][1] + pieces[-1][2] == skip:
            pieces[-1] = (top, pieces[-1][1], pieces[-1][2] + stop - page)
        else:
            pieces.append((top, skip, stop - page))
        page = stop
    return pieces
