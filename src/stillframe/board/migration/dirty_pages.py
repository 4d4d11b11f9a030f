"""Which pages the destination does not have as they are now (QEMU's ``bmap``)."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

_CLEAN = b"\0"
_DIRTY = b"\1"


class DirtyPages:
    """One byte a page, so that runs are found at memory speed. For one thread.

    Args:
        page_counts: target pages of each block.
    """

    def __init__(self, page_counts: Sequence[int]) -> None:
        self._maps = [bytearray(count) for count in page_counts]
        self._block = 0
        self._page = 0
        self.count = 0
        """Pages that are dirty now."""

    def mark(self, block: int, first_page: int, pages: int) -> None:
        """They have to be sent (again)."""
        states = self._maps[block]
        end = min(first_page + pages, len(states))
        self.count += end - first_page - states.count(_DIRTY, first_page, end)
        states[first_page:end] = _DIRTY * (end - first_page)

    def mark_all(self) -> None:
        for block, states in enumerate(self._maps):
            self.mark(block, 0, len(states))

    def next_run(self, most_pages: int) -> tuple[int, int, int] | None:
        """The next dirty pages (block, first page, pages) in address order, from where the last
        ones were; they stay dirty until ``take``."""
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
        """Where ``next_run`` looks next."""
        self._block, self._page = block, page

    def take(self, block: int, first_page: int, pages: int) -> list[tuple[int, int]]:
        """Runs (first page, pages) within a range that were dirty; they are clean now."""
        states = self._maps[block]
        end = min(first_page + pages, len(states))
        found = list(_runs(states, first_page, end))
        for first, length in found:
            states[first : first + length] = _CLEAN * length
            self.count -= length
        return found

    def runs(self, block: int) -> Iterator[tuple[int, int]]:
        """All dirty runs (first page, pages) of a block, ascending."""
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
