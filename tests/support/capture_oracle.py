"""What ``_capture`` computes, in plain Python: the oracle of its tests.

One thread, no protection, no races: the claims, the windows of faults, the slabs, the units of
the sweep, and the records and index runs that come out, with the same limits.
"""

from __future__ import annotations

import struct
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field

TARGET_PAGE_BYTES = 4096
KIND_ZERO, KIND_DATA = 0, 1
_MAX_RUNS = 1024
_MAX_ABSENT = 65536
_UNIT_PAGES = 64
_ABSENT_A_UNIT = 64 * 512
_FLAG_ZERO, _FLAG_PAGE, _FLAG_EOS, _FLAG_CONTINUE = 0x02, 0x08, 0x10, 0x20
_SECTION_PART, _SECTION_FOOTER = 0x02, 0x7E
_RUN = struct.Struct("<IIQII")


@dataclass(frozen=True)
class OracleBlock:
    """A RAM block with its content; ``populated`` holds page numbers (of ``page_bytes``)."""

    idstr: bytes
    content: bytes
    page_bytes: int
    populated: frozenset[int]
    target_pages: int

    @property
    def pages(self) -> int:
        return len(self.content) // self.page_bytes


@dataclass
class _Run:
    block: int
    first_page: int
    pages: int
    kind: int
    data: bytes


@dataclass
class Slab:
    """Captured pages, not yet packed."""

    used_bytes: int = 0
    absent: int = 0
    runs: list[_Run] = field(default_factory=list)


class CaptureOracle:
    """One capture: ``fault`` and ``sweep`` claim pages, ``pack`` makes records of a slab."""

    def __init__(
        self, blocks: Sequence[OracleBlock], *, slab_bytes: int, max_window_bytes: int
    ) -> None:
        self._blocks = tuple(blocks)
        self._slab_bytes = slab_bytes
        self._max_window_bytes = min(max_window_bytes, slab_bytes)
        self._claimed: list[set[int]] = [set() for _ in blocks]
        self._faulted: list[set[int]] = [set() for _ in blocks]
        self._current: Slab | None = None
        self.full: list[Slab] = []
        self._units = [
            (index, first, min(unit, block.pages - first))
            for index, block in enumerate(blocks)
            for unit in [min(_UNIT_PAGES, slab_bytes // block.page_bytes)]
            for first in range(0, block.pages, unit)
        ]

    def window(self, index: int, page: int) -> tuple[int, int]:
        """First page and number of pages that a fault at ``page`` captures at once."""
        block, faulted = self._blocks[index], self._faulted[index]
        most = max(1, self._max_window_bytes // block.page_bytes)
        behind = _run_length((page - n for n in range(1, most + 1)), faulted)
        ahead = 0 if behind else _run_length((page + n for n in range(1, most + 1)), faulted)
        width = 1
        while width < most and width <= max(behind, ahead):
            width *= 2
        if ahead > behind:
            width = min(width, page + 1)
            return page + 1 - width, width
        return page, min(width, block.pages - page)

    def fault(self, index: int, page: int) -> None:
        """The guest writes to a page for the first time, and then to its like."""
        if page in self._claimed[index]:
            return
        first, pages = self.window(index, page)
        slab = self._slab_for(pages * self._blocks[index].page_bytes)
        self._faulted[index].update(self._capture(slab, index, first, pages))

    def _slab_for(self, length_bytes: int) -> Slab:
        slab = self._current
        targets = length_bytes // TARGET_PAGE_BYTES
        if slab is not None and (
            slab.used_bytes + length_bytes > self._slab_bytes
            or len(slab.runs) + targets + 2 > _MAX_RUNS
            or slab.absent + targets > _MAX_ABSENT
        ):
            self.flush()
        if self._current is None:
            self._current = Slab()
        return self._current

    def flush(self) -> None:
        """Hand over the last slab of the faults."""
        if self._current is not None:
            self.full.append(self._current)
            self._current = None

    def sweep(self) -> Slab | None:
        """The next batch in address order; None when every page is claimed."""
        slab = Slab()
        while self._units:
            left = self._slab_bytes - slab.used_bytes
            if left < self._slab_bytes // 4 and slab.used_bytes:
                return slab
            if slab.absent + _ABSENT_A_UNIT > _MAX_ABSENT or len(slab.runs) + 66 > _MAX_RUNS:
                return slab
            index, first, pages = self._units[0]
            if pages * self._blocks[index].page_bytes > left:
                return slab
            del self._units[0]
            self._capture(slab, index, first, pages)
        return slab if slab.runs else None

    def _capture(self, slab: Slab, index: int, first: int, pages: int) -> list[int]:
        block = self._blocks[index]
        won = [page for page in range(first, first + pages) if page not in self._claimed[index]]
        self._claimed[index].update(won)
        for page in won:
            populated = page in block.populated
            data = b""
            if populated:
                start = page * block.page_bytes
                data = block.content[start : start + block.page_bytes]
            else:
                slab.absent += block.page_bytes // TARGET_PAGE_BYTES
            slab.used_bytes += len(data)
            last = slab.runs[-1] if slab.runs else None
            kind = KIND_DATA if populated else KIND_ZERO
            if (
                last is not None
                and (last.block, last.kind) == (index, kind)
                and last.first_page + last.pages == page
            ):
                last.pages += 1
                last.data += data
            else:
                slab.runs.append(_Run(index, page, 1, kind, data))
        return won

    def pack(self, slab: Slab, section_id: int) -> tuple[bytes, bytes]:
        """A slab as one section of the stream, and its packed index runs."""
        raw = bytearray(struct.pack(">BI", _SECTION_PART, section_id))
        runs: list[list[int]] = []
        last_block = None
        for run in slab.runs:
            block = self._blocks[run.block]
            a_page = block.page_bytes // TARGET_PAGE_BYTES
            for n in range(run.pages * a_page):
                target = run.first_page * a_page + n
                if target >= block.target_pages:
                    break
                page = run.data[n * TARGET_PAGE_BYTES : (n + 1) * TARGET_PAGE_BYTES]
                kind = KIND_DATA if any(page) else KIND_ZERO
                _index(runs, run.block, target, kind, len(raw))
                flags = _FLAG_PAGE if kind == KIND_DATA else _FLAG_ZERO
                if last_block == run.block:
                    raw += struct.pack(">Q", target * TARGET_PAGE_BYTES | flags | _FLAG_CONTINUE)
                else:
                    raw += struct.pack(">QB", target * TARGET_PAGE_BYTES | flags, len(block.idstr))
                    raw += block.idstr
                    last_block = run.block
                raw += page if kind == KIND_DATA else b"\0"
        raw += struct.pack(">QBI", _FLAG_EOS, _SECTION_FOOTER, section_id)
        return bytes(raw), b"".join(_RUN.pack(*run) for run in runs)


def _run_length(pages: Iterable[int], among: set[int]) -> int:
    count = 0
    for page in pages:
        if page not in among:
            break
        count += 1
    return count


def _index(runs: list[list[int]], block: int, page: int, kind: int, raw_offset: int) -> None:
    if runs:
        last = runs[-1]
        if (last[0], last[3]) == (block, kind) and last[2] + last[1] == page:
            last[1] += 1
            return
    runs.append([block, 1, page, kind, raw_offset])
