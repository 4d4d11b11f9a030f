"""Capture of a machine's RAM at one instant, while the machine runs.

Owns the write protection, the fault thread and the native core, and turns the core's error numbers
into our errors. The order of calls is that of DESIGN section 2::

    register → start → arm │ stop → protect_written → devices → instant → cont │
    workers until the end → finish → close

A VM that stays armed (``stay_armed``) has one instant after another; each but the first captures
what was written since the previous one::

    stay_armed → register → start → arm │ stop → … → cont │ workers → rearm → …
                                 settle │ stop → … → cont │ workers → rearm → …

``release`` and then ``close`` may be called at any time. They leave every page writable and no
thread waiting, and void what was tracked.
"""

from __future__ import annotations

import os
import time
from collections.abc import Sequence
from contextlib import ExitStack
from typing import Any

from stillframe.capture import _capture
from stillframe.capture.block_files import BlockFiles
from stillframe.capture.core_errors import check_result, lost_error, no_memory
from stillframe.capture.fault_threads import FaultThreads
from stillframe.capture.new_core import new_core, slab_bytes
from stillframe.capture.pieces import in_pieces, in_target_pages
from stillframe.capture.pinning import may_be_pinned
from stillframe.capture.swapping import SwapAccess
from stillframe.capture.wanted_pages import ChangedOf, WantedPages
from stillframe.capture.write_protection import WriteProtection
from stillframe.errors import (
    InternalError,
    RefusedError,
    SnapshotFailed,
)
from stillframe.model import RamBlock, StoppedWrite

_PROTECT_STEP_BYTES = 64 << 20
_UNREGISTER_STEP_BYTES = 16 << 20
_SETTLE_PASSES = 3
_SETTLED_PAGES = 256


class RamCapture:
    """A capture of one process's RAM blocks. Guest state: running, unless noted."""

    def __init__(
        self,
        protection: WriteProtection | None,
        pid: int,
        blocks: Sequence[RamBlock],
        *,
        spill_bytes: int,
    ) -> None:
        """Prepare the capture; the guest is not touched.

        Args:
            protection: of that process's memory; None for a guest that stands still throughout.
            spill_bytes: most memory for faulted pages; at least two slabs are used.

        Raises:
            RefusedError: a block's huge pages are so large that each fault would stall the guest.
            HostError: the memory behind a block cannot be opened, or there is no memory for the
                smallest spill.
        """
        self._protection = protection
        self._pid = pid
        self._in_chunks = protection is not None and protection.kind == "mprotect"
        if self._in_chunks and pid != os.getpid():
            raise InternalError("mprotect is for our own memory", guest_state="running")
        self._blocks = in_pieces(blocks, protection)
        self._wanted = WantedPages(blocks, self._blocks)
        self._armed = False
        self._pins_wanted = False
        self._registered = [0] * len(self._blocks)
        self._blocks_used: dict[int, int] = {}
        self._released = False
        self._slab_bytes = slab_bytes(self._blocks)
        self._spill_bytes = max(spill_bytes, 2 * self._slab_bytes)
        with ExitStack() as on_failure:
            self._threads = FaultThreads()
            on_failure.callback(self._threads.close)
            self._files = BlockFiles(blocks, pid, guest_runs=protection is not None)
            on_failure.callback(self._files.close)
            self._core = new_core(
                protection,
                pid,
                self._blocks,
                self._files,
                self._threads,
                spill_bytes=self._spill_bytes,
            )
            on_failure.pop_all()

    @property
    def spill_bytes(self) -> int:
        return self._spill_bytes

    def leave_in_swap(self, access: SwapAccess) -> None:
        """Swap out again what copying swaps in, so that the VM takes up no more memory. Call it
        before an instant; the caller must keep ``access`` open until the end."""
        self._core.swap_out_again(access.pagemap_fd, access.pidfd, access.is_tight)

    def register(self) -> None:
        """Register every block; the kernel still lets every write pass."""
        if self._protection is None:
            raise InternalError("no protection to register RAM with", guest_state="running")
        for index, block in enumerate(self._blocks):
            length_bytes = block.pages * block.page_size_bytes
            self._protection.register(block.hva, length_bytes)
            self._registered[index] = length_bytes

    def start(self) -> None:
        """Start the fault thread; from now on writes to protected pages are served."""
        self._threads.start(self._core)

    def arm(self) -> float:
        """Protect all RAM while the guest runs, and find out which pages are populated.

        From now on a write un-protects its page and is noted. Pages written meanwhile are protected
        again, in passes, as long as their number shrinks.

        Returns:
            The time that it took, milliseconds.
        """
        began = time.monotonic()
        self._armed = True
        self._protect_all()
        self.learn_population()
        if self._pins_wanted:
            self._pin()
        self._settle()
        return (time.monotonic() - began) * 1e3

    def pin_droppable(self) -> None:
        """Pin RAM that the guest may drop (balloon, virtio-mem); call it before ``arm``.

        A page punched out of a shared memory file is gone before any event reports it. So the pages
        are pinned from ``arm`` to the end, as far as the host permits; the host cannot reclaim them
        earlier."""
        self._pins_wanted = True

    def _pin(self) -> None:
        for index, (block, fd) in enumerate(zip(self._blocks, self._files.readers, strict=True)):
            if fd is not None and block.shared and not self._in_chunks and may_be_pinned(block):
                # If pinning is refused, dropping an unsaved page fails the snapshot.
                self._core.pin(index)

    def settle(self) -> float:
        """As ``arm``, for RAM that has stayed armed: protect only what was written."""
        began = time.monotonic()
        self._settle()
        self._wanted.populated = self._core.populated_pages()
        return (time.monotonic() - began) * 1e3

    def _settle(self) -> None:
        before = None
        for _ in range(_SETTLE_PASSES):
            pages = self.protect_written()
            if pages <= _SETTLED_PAGES or (before is not None and pages > before // 2):
                break
            before = pages

    def _protect_all(self) -> None:
        for index, block in enumerate(self._blocks):
            step = max(1, _PROTECT_STEP_BYTES // block.page_size_bytes)
            for first in range(0, block.pages, step):
                check_result(
                    self._core.protect(index, first, min(step, block.pages - first)),
                    f"protecting {block.idstr}",
                )
                self.check()  # unserved faults would also keep the VM from stopping

    def learn_population(self) -> None:
        """Find out which pages were ever populated; the others are not read."""
        self._wanted.learn(self._core, self._files, self._pid)

    @property
    def copied_whole(self) -> tuple[str, ...]:
        """The blocks that are copied whole."""
        return self._wanted.copied_whole

    def copy_only(self, changed_pages: ChangedOf) -> None:
        """Copy only pages that may have changed since some earlier instant; call before ``arm``.

        Args:
            changed_pages: called for each block, once it is protected (or stands still) and before
                the instant. Returns the changed runs (first page, pages), in target pages, or None
                to copy the whole block. Pages written after the call are added.
        """
        self._wanted.changed_of = changed_pages

    def populated_runs(self) -> list[list[tuple[int, int]]]:
        """Return for each block the runs (first page, pages) that :meth:`learn_population` found
        populated last, in target pages, clipped to the block."""
        return [
            [in_target_pages(block, *run) for run in self._core.populated_runs(index)]
            for index, block in enumerate(self._blocks)
        ]

    def protect_written(self) -> int:
        """Protect again what was written since it was protected; return the number of pages.

        If RAM is not armed, protect all of it.
        """
        if not self._armed:
            self._armed = True
            self._protect_all()
            self.learn_population()
        return check_result(self._core.protect_noted(), "protecting what was written")

    def stay_armed(self) -> None:
        """Keep pages protected after their copy, so that the next instant knows what was written
        since; call before ``arm``.

        Raises:
            RefusedError: RAM could change unseen between two instants; ``why`` says how.
        """
        for block in self._blocks:
            if self._in_chunks or block.backing == "hugetlbfs":
                raise RefusedError(
                    f"{block.idstr} cannot be watched",
                    why="nobody tells of huge pages that a balloon or virtio-mem gives back"
                    if block.backing == "hugetlbfs"
                    else "without a userfaultfd nobody tells of RAM that is given back",
                    remedy="take its snapshots one by one, with 'stillframe take'",
                )
        self._core.stay()

    def rearm(self) -> None:
        """Keep RAM protected and note writes for the next instant; call it instead of ``finish``,
        once all workers found nothing more. The workers then still have to take the last faults'
        copies."""
        self._core.set_phase(_capture.PHASE_ARMED)  # returns once a fault under way is served
        self._core.flush()

    def track_finely(self) -> None:
        """Track writes page by page if the kernel protects single pages, so that ``take_written``
        overstates little; call before ``arm``. Otherwise scattered writes would count 16 times, and
        precopy would never converge."""
        self._core.track_finely()

    def take_written(self) -> list[tuple[int, int, int]]:
        """Return what was written since it was protected or last taken, and protect it again.

        For tracking while the guest runs, after ``arm``: a write that is not in this answer is in
        the next one. Pages read after the call contain at least the writes in the answer.

        Returns:
            Runs (index of the block, first page, pages), in target pages, clipped to the block.

        Raises:
            MachineError, HostError, InternalError: RAM could not be protected.
        """
        taken = self._core.take_noted()
        if isinstance(taken, int):
            check_result(taken, "protecting what was written")
            return []
        return [
            (index, *in_target_pages(self._blocks[index], first, pages))
            for index, first, pages in taken
        ]

    def instant(self) -> tuple[StoppedWrite, ...]:
        """Fix the instant: after the return, every page is saved before it changes.

        The guest must be stopped, and the monitor must not be used meanwhile: a VMM thread that
        writes to RAM waits during the call, for microseconds.

        Returns:
            The RAM that the VMM itself wrote since the last ``protect_written``.
        """
        self._core.set_phase(_capture.PHASE_HOLD)
        runs = self._core.noted_runs()
        self.protect_written()
        self._wanted.wanted = self._core.begin_job()
        self._blocks_used = self._count_blocks()
        self._core.set_phase(_capture.PHASE_ACTIVE)
        return tuple(
            StoppedWrite(
                idstr=self._blocks[index].idstr,
                offset_bytes=first * self._blocks[index].page_size_bytes,
                length_bytes=pages * self._blocks[index].page_size_bytes,
            )
            for index, first, pages in runs
        )

    def worker(self, section_id: int) -> _capture.Worker:
        """Make the buffers of one worker thread; ``next`` returns the next batch of the sweep or
        the spill.

        Args:
            section_id: id of the stream's ``ram`` section; the same for all workers.

        Raises:
            HostError: there is no memory for the buffers.
        """
        self._core.set_section_id(section_id)
        try:
            return _capture.Worker(self._core)
        except MemoryError as error:
            raise no_memory(2 * self._slab_bytes) from error

    def hand_on_spilled(self) -> None:
        """Make the fault thread hand on its copies before its slab is full; soon
        ``Worker.take_spilled`` returns them."""
        self._threads.hand_on_spilled()

    def check_copied(self) -> None:
        """Raise unless everything copied so far shows the instant; after ``release`` it does not.
        Errors as :meth:`check`."""
        self.check()
        if self._released:
            raise SnapshotFailed("the snapshot was given up", guest_state="running")

    def check(self) -> None:
        """Raise if the snapshot can no longer show one instant.

        Raises:
            SnapshotFailed: RAM was dropped or unmapped before it was copied.
            MachineError: the VM exited.
        """
        error, lost = self._core.failure()
        if lost:
            kind, hva, length_bytes = lost
            raise lost_error(kind, f"{self._name(hva)}, {length_bytes} bytes")
        for index, now in self._count_blocks().items():
            if now < self._blocks_used.get(index, 0):
                raise lost_error(_capture.LOST_HOLE, self._blocks[index].idstr)
        check_result(error, "copying guest RAM")

    def _count_blocks(self) -> dict[int, int]:
        counts = {
            index: self._files.count_used(index)
            for index, block in enumerate(self._blocks)
            if self._in_chunks and block.shared
        }
        return {index: count for index, count in counts.items() if count is not None}

    def _name(self, hva: int) -> str:
        for block in self._blocks:
            if block.hva <= hva < block.hva + block.max_length_bytes:
                return f"{block.idstr} at offset {hva - block.hva:#x}"
        return f"address {hva:#x}"

    def statistics(self) -> dict[str, Any]:
        """Return the current counters, in time independent of the size of RAM."""
        return self._core.statistics() | {
            "pages_populated": self._wanted.populated,
            "pages_wanted": self._wanted.wanted,
            "pages_unchanged": self._wanted.all - self._wanted.wanted,
        }

    def finish(self) -> None:
        """End the protection, then the fault thread; call once all workers found nothing more."""
        # Every page is claimed, and done except those of one fault under way: unregistering would
        # wake its writer in the middle of the copy.
        self._core.await_fault()
        self._unregister()
        self._threads.stop()
        self._core.flush()

    def release(self) -> None:
        """Give up: let every write pass without a copy. May be called at any time."""
        self._released = True
        self._core.set_phase(_capture.PHASE_RELEASE)
        self._unregister()

    def _unregister(self) -> None:
        # In steps: the kernel clears a range under the lock that page faults need, so the guest
        # would have to wait for the whole range.
        for index, block in enumerate(self._blocks):
            step = max(1, _UNREGISTER_STEP_BYTES // block.page_size_bytes)
            pages = self._registered[index] // block.page_size_bytes
            self._registered[index] = 0
            for first in range(0, pages, step):
                # A failure means that the range is gone: the VM exited or unplugged it.
                self._core.unregister(index, first, min(step, pages - first))

    def close(self) -> None:
        """Close the protection and everything else; the kernel wakes all waiting threads."""
        self._core.set_phase(_capture.PHASE_RELEASE)  # else the fault thread may wait for room
        self._threads.stop()
        self._core.let_go()
        if self._protection is not None:
            self._protection.close()
        self._files.close()
        self._threads.close()
