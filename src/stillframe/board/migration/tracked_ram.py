"""Guest RAM with tracked writes, sent in rounds and, in postcopy, on request.

``RamCapture`` stays in its armed phase: a write lifts the protection of its pages and makes them
dirty; ``take_written`` takes the dirty pages and protects them again, in one step. So a page that
changes during or after its read becomes dirty and is sent once more.
Source: QEMU ``migration/ram.c``: ram_find_and_save_block, migration_bitmap_sync.
"""

from __future__ import annotations

import os
import time
from collections import deque
from collections.abc import Callable, Sequence

from stillframe.board.memory.guest_ram import GuestRam
from stillframe.board.migration.counters import Counters
from stillframe.board.migration.dirty_pages import DirtyPages
from stillframe.board.migration.return_path import PageRequest
from stillframe.board.state.handlers import Output
from stillframe.capture.population import end_of_data
from stillframe.capture.ram_capture import RamCapture
from stillframe.errors import DataError
from stillframe.model import TARGET_PAGE_BYTES
from stillframe.vmstate.page_records import detected_records, zero_records

_BATCH_PAGES = 256
_POSTCOPY_BATCH_PAGES = 64
"""Smaller, since a requested page waits for the batch in progress."""
_LEAST_BATCH_PAGES = 4
_BATCHES_PER_S = 10
_HOLE_PAGES = 1 << 16


class TrackedRam:
    """The sender of dirty RAM. For the migration's thread, except for ``request``.

    Args:
        rams: all RAM blocks, in the capture's order.
        capture: covers the same blocks; must be armed before ``begin``.
        on_sync: called after each round's sync with the number of syncs so far.
    """

    def __init__(
        self,
        rams: Sequence[GuestRam],
        capture: RamCapture,
        counters: Counters,
        on_sync: Callable[[int], None],
    ) -> None:
        self._rams = tuple(rams)
        self._capture = capture
        self._counters = counters
        self._on_sync = on_sync
        self._pages = [ram.length_bytes // TARGET_PAGE_BYTES for ram in self._rams]
        self.dirty = DirtyPages(self._pages)
        self._indexes = {ram.idstr: index for index, ram in enumerate(self._rams)}
        self._data_until = [(0, 0)] * len(self._rams)
        # The return path's thread appends; a deque's append and popleft are atomic.
        self._requests: deque[tuple[int, int, int]] = deque()
        self._requested_block: int | None = None
        self._synced_s = 0.0
        self.synced_bytes = 0
        """The dirty bytes at the start of the current round."""
        self.in_postcopy = False
        self._limit_pages = _BATCH_PAGES
        self._files: list[int] = []
        try:
            for ram in self._rams:
                # Reopened: SEEK_DATA moves the file position, which a duplicate would share.
                self._files.append(os.open(f"/proc/self/fd/{ram.fd}", os.O_RDONLY | os.O_CLOEXEC))
        except BaseException:
            self.close()
            raise

    def close(self) -> None:
        for fd in self._files:
            os.close(fd)
        self._files.clear()

    @property
    def remaining_bytes(self) -> int:
        return self.dirty.count * TARGET_PAGE_BYTES

    def begin(self) -> None:
        """Mark all RAM dirty."""
        self.dirty.mark_all()
        self._synced_s = time.monotonic()
        self._note_remaining()

    def sync(self) -> None:
        """Begin a round: add the pages written since the last one."""
        now = time.monotonic()
        pages = sum(pages for _, _, pages in self.written_since())
        counters = self._counters
        counters.dirty_syncs += 1
        counters.dirty_pages_per_s = int(pages / max(1e-3, now - self._synced_s))
        self._synced_s = now
        self.synced_bytes = self.remaining_bytes
        self._on_sync(counters.dirty_syncs)

    def written_since(self) -> list[tuple[str, int, int]]:
        """Return the runs (idstr, first page, pages) written since the last call; now dirty."""
        runs = self._capture.take_written()
        for block, first_page, pages in runs:
            self.dirty.mark(block, first_page, pages)
        self._note_remaining()
        return [(self._rams[block].idstr, first, pages) for block, first, pages in runs]

    def _note_remaining(self) -> None:
        self._counters.remaining_bytes = self.remaining_bytes

    def limit_batch(self, bytes_per_s: int) -> None:
        """Make batches small enough for a slow channel; 0 means unlimited."""
        pages = bytes_per_s // TARGET_PAGE_BYTES // _BATCHES_PER_S
        self._limit_pages = (
            min(_BATCH_PAGES, max(_LEAST_BATCH_PAGES, pages)) if bytes_per_s else _BATCH_PAGES
        )

    # --- records of the `ram` section -----------------------------------------------------

    def batch(self, out: Output) -> bool:
        """Send some pages, requested ones first; return True if none are dirty any more."""
        budget = (
            min(_POSTCOPY_BATCH_PAGES, self._limit_pages) if self.in_postcopy else self._limit_pages
        )
        named: int | None = None
        for block, first_page, pages in self._take_requests():
            named = self._send(out, block, first_page, pages, named)
        while budget > 0:
            run = self.dirty.next_run(_HOLE_PAGES)
            if run is None:
                break
            block, first_page, pages = run
            is_data, pages = self._extent(block, first_page, pages)
            if is_data:
                pages = min(pages, budget)
                budget -= pages
            else:
                budget -= 1 + pages * _BATCH_PAGES // _HOLE_PAGES
            self.dirty.take(block, first_page, pages)
            named = self._send_extent(out, block, first_page, pages, is_data, named)
        self._note_remaining()
        return self.dirty.count == 0

    def _send(
        self, out: Output, block: int, first_page: int, pages: int, named: int | None
    ) -> int | None:
        while pages:
            is_data, length = self._extent(block, first_page, pages)
            named = self._send_extent(out, block, first_page, length, is_data, named)
            first_page += length
            pages -= length
        return named

    def _send_extent(
        self,
        out: Output,
        block: int,
        first_page: int,
        pages: int,
        is_data: bool,
        named: int | None,
    ) -> int:
        offset_bytes = first_page * TARGET_PAGE_BYTES
        name = None if block == named else self._rams[block].idstr
        counters = self._counters
        if is_data:
            # Read through the file: a read through the mapping would populate holes, and pread
            # copies without the GIL.
            content = os.pread(self._files[block], pages * TARGET_PAGE_BYTES, offset_bytes)
            records, zeroes = detected_records(offset_bytes, content, block=name)
            out.write(records)
            counters.zero_pages += zeroes
            counters.data_pages += pages - zeroes
        else:
            out.write(zero_records(offset_bytes, pages, block=name))
            counters.zero_pages += pages
        return block

    def _extent(self, block: int, first_page: int, pages: int) -> tuple[bool, int]:
        """Return whether a run begins with data or a hole (True: data), and for how many pages."""
        start = first_page * TARGET_PAGE_BYTES
        end = start + pages * TARGET_PAGE_BYTES
        data_start, data_end = self._data_until[block]
        if data_start <= start < data_end:
            return True, (min(end, data_end) - start) // TARGET_PAGE_BYTES
        fd = self._files[block]
        try:
            data = os.lseek(fd, start, os.SEEK_DATA)
        except OSError:
            return False, pages  # ENXIO: a hole up to the end of the file
        if data > start:
            return False, (min(end, data) - start) // TARGET_PAGE_BYTES
        # Kept, since the search for the end takes longer the more data there is.
        hole = end_of_data(fd, start, self._pages[block] * TARGET_PAGE_BYTES)
        self._data_until[block] = (start, hole)
        return True, (min(end, hole) - start) // TARGET_PAGE_BYTES

    # --- postcopy ----------------------------------------------------------------------

    def request(self, request: PageRequest) -> None:
        """Queue pages that the destination waits for. Called in the return path's thread.

        Raises:
            DataError: an unknown block, or a range that is misaligned or not within it.
        """
        if request.idstr is not None:
            block = self._indexes.get(request.idstr)
            if block is None:
                raise DataError(f"the destination asks for unknown RAM block '{request.idstr}'")
            self._requested_block = block
        if self._requested_block is None:
            raise DataError("the destination's first request names no RAM block")
        block = self._requested_block
        first_page, odd = divmod(request.offset_bytes, TARGET_PAGE_BYTES)
        pages, odd_length = divmod(request.length_bytes, TARGET_PAGE_BYTES)
        if odd or odd_length:
            raise DataError(
                "MIG_RP_MSG_REQ_PAGES: Misaligned page request, "
                f"start: {request.offset_bytes:#x} len: {request.length_bytes}"
            )
        if first_page + pages > self._pages[block]:
            raise DataError(
                f"the destination asks for pages beyond RAM block '{self._rams[block].idstr}'"
            )
        self._requests.append((block, first_page, pages))
        self._counters.postcopy_requests += 1

    def _take_requests(self) -> list[tuple[int, int, int]]:
        wanted = []
        while self._requests:
            block, first_page, pages = self._requests.popleft()
            wanted += [
                (block, first, length)
                for first, length in self.dirty.take(block, first_page, pages)
            ]
            # The guest will soon want the pages that follow.
            self.dirty.go_on_from(block, first_page + pages)
        return wanted
