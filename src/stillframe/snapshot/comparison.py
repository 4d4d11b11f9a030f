"""Comparison of pages with the parent snapshot: drops the unchanged pages from a batch."""

from __future__ import annotations

from collections.abc import Collection, Iterator, Sequence
from threading import Lock

from stillframe.errors import DataError
from stillframe.model import TARGET_PAGE_BYTES, RamBlock
from stillframe.still.frames import BytesLike
from stillframe.still.index import KIND_DATA, WORD_BYTES, PageRun
from stillframe.still.index_builder import PACKED_RUN
from stillframe.still.ram_section import RamSection
from stillframe.still.records import payload_start, record_bytes
from stillframe.still.snapshot import Snapshot

_CACHE_BYTES = 128 << 20
"""For frames of the parent: large, because pages that were saved on faults are in no order."""
_STRIDE = record_bytes(KIND_DATA, TARGET_PAGE_BYTES)


class Comparison:
    """The comparison of batches with a parent. Thread-safe.

    Args:
        blocks: the VM's. compared: names of the blocks to compare; the others are kept whole.

    ``data_pages``, ``zero_pages``: pages dropped so far, by class.
    """

    def __init__(
        self, parent: Snapshot, blocks: Sequence[RamBlock], compared: Collection[str]
    ) -> None:
        self._parent = parent
        self._names = [block.idstr for block in blocks]
        known = {block.idstr: number for number, block in enumerate(parent.blocks)}
        self._numbers = [known.get(name) if name in compared else None for name in self._names]
        self._lock = Lock()
        self.data_pages = self.zero_pages = 0
        parent.container.grow_cache(_CACHE_BYTES)

    def changed(
        self, raw: memoryview, packed: bytes, section_id: int, *, footer: bool
    ) -> tuple[BytesLike, Sequence[PageRun] | bytes]:
        """Return a batch without the pages that equal the parent's; no runs if none are left.

        Args:
            raw: a whole RAM part. packed: its runs (``index_builder.PACKED_RUN``).
        """
        section = RamSection(section_id, footer=footer, page_bytes=TARGET_PAGE_BYTES)
        data = zero = 0
        for block, pages, first, kind, raw_offset in PACKED_RUN.iter_unpack(packed):
            run = PageRun(block, first, pages, kind, raw_offset)
            start = payload_start(raw, run, self._names[block], TARGET_PAGE_BYTES)
            content = raw[start:] if kind == KIND_DATA else None
            kept = 0
            for skip, count in self._pieces(run, content):
                part = None if content is None else content[skip * _STRIDE :]
                section.add(block, self._names[block], first + skip, count, part)
                kept += count
            if kind == KIND_DATA:
                data += pages - kept
            else:
                zero += pages - kept
        if not data and not zero:
            return raw, packed
        with self._lock:
            self.data_pages += data
            self.zero_pages += zero
        return section.finish(), section.runs

    def _pieces(self, run: PageRun, content: memoryview | None) -> Iterator[tuple[int, int]]:
        """Yield the pieces of the run that differ from the parent's: (offset, pages)."""
        number = self._numbers[run.block]
        if number is None:
            yield 0, run.pages
            return
        begin = at = 0
        for count, differs in self._told(number, run, content):
            if not differs:
                if begin < at:
                    yield begin, at - begin
                begin = at + count
            at += count
        if begin < at:
            yield begin, at - begin

    def _told(
        self, number: int, run: PageRun, content: memoryview | None
    ) -> Iterator[tuple[int, bool]]:
        """Cover the run from first to last page: (pages, whether they differ from the parent's)."""
        index, idstr = self._parent.index, self._parent.blocks[number].idstr
        at = 0
        while at < run.pages:
            found = index.lookup(number, run.first_page + at)
            if found is None:
                yield 1, True
                at += 1
                continue
            count = min(found.run.pages - found.position, run.pages - at)
            if content is None or found.run.kind != KIND_DATA:
                yield count, found.run.kind != run.kind
            else:
                try:
                    theirs = self._parent.run_content(found.frame, found.run, idstr)
                except DataError:  # the parent is damaged here: save the pages again
                    yield count, True
                else:
                    theirs = theirs[found.position * _STRIDE :]
                    yield from _compared(content[at * _STRIDE :], theirs, count)
            at += count


def _compared(ours: memoryview, theirs: memoryview, count: int) -> Iterator[tuple[int, bool]]:
    length = count * _STRIDE - WORD_BYTES
    if bytes(ours[:length]) == bytes(theirs[:length]):
        yield count, False
        return
    for number in range(count):
        yield 1, _page(ours, number) != _page(theirs, number)


def _page(content: memoryview, number: int) -> bytes:
    start = number * _STRIDE
    return bytes(content[start : start + TARGET_PAGE_BYTES])
