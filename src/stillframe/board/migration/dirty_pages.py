"""The map of dirty pages: those whose current content the destination lacks (QEMU's ``bmap``)."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

_CLEAN = b"\0"
_DIRTY = b"\1"


class DirtyPages:
    """A dirty map with one byte per page, to find runs at memory speed. For one thread.

    Args:
        page_counts: the number of target pages of each block.
    """

    def __init__(self, page_counts: Sequence[int]) -> None:
        self._maps = [bytearray(count) for count in page_counts]
        self._block = 0
        self._page = 0
        self.count = 0
        """The number of dirty pages."""

    def mark(self, block: int, first_page: int, pages: int) -> None:
        """Mark pages dirty: they must be sent (again)."""
        states = self._maps[block]
        end = min(first_page + pages, len(states))
        self.count += end - first_page - states.count(_DIRTY, first_page, end)
        states[first_page:end] = _DIRTY * (end - first_page)

    def mark_all(self) -> None:
        for block, states in enumerate(self._maps):
            self.mark(block, 0, len(states))

    def next_run(self, most_pages: int) -> tuple[int, int, int] | None:
        """Return the next dirty run (block, first page, pages) in address order, or None.

        The search starts at the last run found. The pages stay dirty until ``take``.
        """
        if self.count == 0:
            return None
        while True:
            states = self._maps[self._block]
            first = states.find(_DIRTY, self._page)
            if first >= 0:
                end = states.find(_CLEAN, first, first + most_pages)
                if end < 0:
                    end = min(first + most_pages, len(states))
                self._page = first
                return self._block, first, end - first
            self._page = 0
            self._block = (self._block + 1) % len(self._maps)

    def go_on_from(self, block: int, page: int) -> None:
        """Set where ``next_run`` searches next."""
        self._block, self._page = block, page

    def take(self, block: int, first_page: int, pages: int) -> list[tuple[int, int]]:
        """Clean a range, and return the runs (first page, pages) in it that were dirty."""
        states = self._maps[block]
        end = min(first_page + pages, len(states))
        found = list(_runs(states, first_page, end))
        for first, length in found:
            states[first : first + length] = _CLEAN * length
            self.count -= length
        return found

    def runs(self, block: int) -> Iterator[tuple[int, int]]:
        """Yield all dirty runs (first page, pages) of a block, ascending."""
        return _runs(self._maps[block], 0, len(self._maps[block]))


def _runs(states: bytearray, start: int, stop: int) -> Iterator[tuple[int, int]]:
    at = start
    while True:
        first = states.find(_DIRTY, at, stop)
        if first < 0:
            return
        at = states.find(_CLEAN, first, stop)
        if at < 0:
            at = stop
        yield first, at - first
