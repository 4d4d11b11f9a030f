"""The index of a snapshot file: maps pages of blocks to frames and offsets.

Runs of pages are columns of plain integers, sorted by block and page: a guest of 64 GiB can have
millions of runs.
"""

from __future__ import annotations

from array import array
from bisect import bisect_right
from collections.abc import Iterator, Sequence
from itertools import accumulate, islice, repeat
from operator import add, le
from typing import Final, NamedTuple

from stillframe.errors import DataError
from stillframe.still.frames import FRAME_RAW_MAX_BYTES

KIND_ZERO: Final = 0
KIND_DATA: Final = 1

DIGEST_BYTES: Final = 32
ZERO_RECORD_BYTES: Final = 9
"""Length of a zero page's record that names no block: its word and the fill byte."""
WORD_BYTES: Final = 8


class PageRun(NamedTuple):
    """Consecutive pages of one kind, in a block and in a frame.

    ``block``: number of the block in the manifest. ``first_page``, ``pages``: in target pages.
    ``kind``: ``KIND_DATA`` or ``KIND_ZERO``. ``raw_offset``: where in the decompressed frame the
    first page's record (its 8-byte word) starts. The first record may name its block; the others
    follow directly, with the CONTINUE flag.
    """

    block: int
    first_page: int
    pages: int
    kind: int
    raw_offset: int


class FrameEntry(NamedTuple):
    """A frame of the payload. Offsets: in the file, and in the decompressed stream."""

    offset_bytes: int
    stored_bytes: int
    stream_offset_bytes: int
    raw_bytes: int
    digest: bytes


class BlockEntry(NamedTuple):
    """A RAM block: name, used length, and its slice ``first_run:end_run`` of the runs."""

    idstr: str
    used_length_bytes: int
    first_run: int
    end_run: int


class PageLocation(NamedTuple):
    """Where one page is: record number ``position`` of ``run``, which lies in ``frame``."""

    frame: int
    run: PageRun
    position: int


class Columns(NamedTuple):
    """The runs as columns; row ``i`` of all columns is run ``i``."""

    first_page: array[int]  # Q
    pages: array[int]  # I
    frame: array[int]  # I
    raw_offset: array[int]  # I
    kind: array[int]  # B


def empty_columns() -> Columns:
    """Columns without rows."""
    return Columns(array("Q"), array("I"), array("I"), array("I"), array("B"))


class Index:
    """A decoded and checked index. Immutable; safe to share between threads."""

    def __init__(
        self,
        *,
        target_page_bytes: int,
        blocks: Sequence[BlockEntry],
        raw_bytes: array[int],
        stored_bytes: array[int],
        digests: bytes,
        columns: Columns,
    ) -> None:
        self.target_page_bytes = target_page_bytes
        self.blocks = tuple(blocks)
        self.columns = columns
        self._raw_bytes = raw_bytes
        self._stored_bytes = stored_bytes
        self._digests = digests
        self._offsets = array("Q", accumulate(stored_bytes, initial=0))
        self._stream_offsets = array("Q", accumulate(raw_bytes, initial=0))
        self._by_position: array[int] | None = None
        self._check()

    @property
    def frame_count(self) -> int:
        return len(self._raw_bytes)

    @property
    def run_count(self) -> int:
        return len(self.columns.pages)

    @property
    def stream_bytes(self) -> int:
        """Length of the decompressed payload."""
        return self._stream_offsets[-1]

    @property
    def stored_bytes(self) -> int:
        """Length of all payload frames in the file."""
        return self._offsets[-1]

    def frame(self, number: int) -> FrameEntry:
        """Return one frame's entry; numbers count from 0 in file order."""
        return FrameEntry(
            self._offsets[number],
            self._stored_bytes[number],
            self._stream_offsets[number],
            self._raw_bytes[number],
            self._digests[number * DIGEST_BYTES : (number + 1) * DIGEST_BYTES],
        )

    def frame_sizes(self, *, sealed: bool = False) -> Iterator[tuple[int, int]]:
        """Return (stored, decompressed) length of each frame in order, as in the seek table: to
        zstd, a sealed frame is empty."""
        raw_bytes = repeat(0, self.frame_count) if sealed else self._raw_bytes
        return zip(self._stored_bytes, raw_bytes, strict=True)

    def run(self, block: int, row: int) -> PageRun:
        """Return the run in a row of the columns."""
        c = self.columns
        return PageRun(block, c.first_page[row], c.pages[row], c.kind[row], c.raw_offset[row])

    def lookup(self, block: int, page: int) -> PageLocation | None:
        """Return where a page is, or None if this file does not hold it. O(log runs).

        Args:
            block: number of the block. page: number of the target page in the block.
        """
        entry = self.blocks[block]
        first_page = self.columns.first_page
        row = bisect_right(first_page, page, entry.first_run, entry.end_run) - 1
        if row < entry.first_run or page - first_page[row] >= self.columns.pages[row]:
            return None
        return PageLocation(self.columns.frame[row], self.run(block, row), page - first_page[row])

    def runs_of_block(self, block: int) -> Iterator[tuple[int, PageRun]]:
        """Yield (frame number, run) of a block in page order."""
        entry = self.blocks[block]
        for row in range(entry.first_run, entry.end_run):
            yield self.columns.frame[row], self.run(block, row)

    def runs_of_frame(self, number: int) -> list[PageRun]:
        """Return a frame's runs in the order of its records."""
        order, frames = self._rows_by_position(), self.columns.frame
        start = bisect_right(order, number - 1, key=frames.__getitem__)
        end = bisect_right(order, number, lo=start, key=frames.__getitem__)
        starts = [entry.first_run for entry in self.blocks]
        return [self.run(bisect_right(starts, row) - 1, row) for row in order[start:end]]

    def frames_without_runs(self) -> list[int]:
        """Return the frames without indexed pages: head, devices, description."""
        with_runs = set(self.columns.frame)
        return [number for number in range(self.frame_count) if number not in with_runs]

    def _rows_by_position(self) -> array[int]:
        if self._by_position is None:
            frame, raw_offset = self.columns.frame, self.columns.raw_offset
            keys = [f << 32 | o for f, o in zip(frame, raw_offset, strict=True)]
            self._by_position = array("I", sorted(range(len(keys)), key=keys.__getitem__))
        return self._by_position

    def page_counts(self, block: int) -> tuple[int, int]:
        """Return the (data pages, zero pages) of a block that this file holds."""
        entry = self.blocks[block]
        rows = slice(entry.first_run, entry.end_run)
        kinds, pages = self.columns.kind[rows], self.columns.pages[rows]
        data = sum(count for kind, count in zip(kinds, pages, strict=True) if kind == KIND_DATA)
        return data, sum(pages) - data

    def _check(self) -> None:
        """Check every property that other code relies on.

        Raises:
            DataError: runs overlap, leave their block or frame, or have an unknown kind.
        """
        c = self.columns
        if max(self._raw_bytes, default=0) > FRAME_RAW_MAX_BYTES:
            raise DataError(f"the index names a frame of more than {FRAME_RAW_MAX_BYTES} bytes")
        if c.kind and max(c.kind) > KIND_DATA:
            raise DataError("the index names an unknown kind of page")
        if c.pages and min(c.pages) == 0:
            raise DataError("the index has a run without pages")
        if c.frame and max(c.frame) >= self.frame_count:
            raise DataError(
                f"the index refers to frame {max(c.frame)}, the file has {self.frame_count}"
            )
        self._check_places()
        for entry in self.blocks:
            rows = slice(entry.first_run, entry.end_run)
            first = c.first_page[rows]
            ends = list(map(add, first, c.pages[rows]))
            if not all(map(le, ends, islice(first, 1, None))):
                raise DataError(f"the index is not in order, or overlaps, in block {entry.idstr!r}")
            if ends and ends[-1] > -(-entry.used_length_bytes // self.target_page_bytes):
                raise DataError(f"the index has pages beyond the end of block {entry.idstr!r}")

    def _check_places(self) -> None:
        """Check that each run's records, at their shortest, fit in its frame."""
        c = self.columns
        sizes = (ZERO_RECORD_BYTES, WORD_BYTES + self.target_page_bytes)
        raw_of = self._raw_bytes.__getitem__
        lengths = (pages * sizes[kind] for pages, kind in zip(c.pages, c.kind, strict=True))
        if not all(map(le, map(add, c.raw_offset, lengths), map(raw_of, c.frame))):
            raise DataError("the index has a run that does not fit in its frame")
