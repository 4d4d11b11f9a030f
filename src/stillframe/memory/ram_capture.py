"""Capture of a machine's RAM at one instant, while the machine runs.

Owns the write protection, the fault thread and the native core; raises our errors where the core
returns numbers. The order of calls is that of DESIGN section 2::

    register → start → arm │ stop → protect_written → devices → instant → cont │
    workers until the end → finish → close

``release`` and ``close`` may be called at any moment, in this order, and leave every page
writable and nobody waiting.
"""

from __future__ import annotations

import contextlib
import errno
import os
import threading
import time
from collections.abc import Sequence
from typing import Any

import msgspec

from stillframe.errors import (
    HostError,
    InternalError,
    MachineError,
    RefusedError,
    SnapshotFailed,
)
from stillframe.memory import _capture
from stillframe.memory.own_protection import WriteProtection
from stillframe.memory.population import file_behind, mark_populated
from stillframe.memory.signal_protection import chunks_of
from stillframe.model import RamBlock, StoppedWrite

SLAB_BYTES = 1 << 20
MOST_PAGE_BYTES = 64 << 20
"""Larger huge pages would stall the guest for too long at each fault."""
_TARGET_PAGE_BYTES = 4096
_MAX_WINDOW_BYTES = 1 << 20
_PROTECT_STEP_BYTES = 64 << 20
_UNREGISTER_STEP_BYTES = 16 << 20
_FIRST_SPILL_BYTES = 32 << 20
_SETTLE_PASSES = 3
_SETTLED_PAGES = 256

_LOST = {
    _capture.LOST_REMOVED: "RAM was dropped (balloon or free page reporting)",
    _capture.LOST_UNMAPPED: "RAM was unmapped (hot-unplug or resize)",
    _capture.LOST_HOLE: "RAM was punched out of its file (balloon or virtio-mem)",
}


class RamCapture:
    """The RAM blocks of one process under capture. Guest state: running, unless said."""

    def __init__(
        self,
        protection: WriteProtection | None,
        pid: int,
        blocks: Sequence[RamBlock],
        *,
        spill_bytes: int,
    ) -> None:
        """Prepare; nothing of the guest is touched.

        Args:
            protection: of that process's memory; None for a guest that stands still all the time.
            spill_bytes: most memory for faulted pages; at least two slabs are used.

        Raises:
            RefusedError: huge pages so large that each fault would stall the guest for long.
            HostError: the memory behind a block cannot be opened.
        """
        self._protection = protection
        self._pid = pid
        # A guest that stands still is copied in target pages, however large its huge pages are.
        self._in_chunks = protection is not None and protection.kind == "mprotect"
        if self._in_chunks and pid != os.getpid():
            raise InternalError("mprotect is for our own memory", guest_state="running")
        if protection is None:
            pieces = [_TARGET_PAGE_BYTES] * len(blocks)
        elif self._in_chunks:
            pieces = chunks_of(blocks)
        else:
            pieces = [block.page_size_bytes for block in blocks]
        self._blocks = tuple(
            msgspec.structs.replace(block, page_size_bytes=piece)
            for block, piece in zip(blocks, pieces, strict=True)
        )
        _refuse_gigantic(self._blocks)
        self._armed = False
        self._registered = [0] * len(self._blocks)
        self._files: list[int] = []
        self._blocks_used: dict[int, int] = {}
        self._thread: threading.Thread | None = None
        self._spill_thread: threading.Thread | None = None
        self._stop_fd = os.eventfd(0, os.EFD_CLOEXEC | os.EFD_NONBLOCK)
        self._slab_bytes = max([SLAB_BYTES, *(block.page_size_bytes for block in self._blocks)])
        self._spill_bytes = max(spill_bytes, 2 * self._slab_bytes)
        try:
            self._readers = [self._open_file(block) for block in self._blocks]
            self._core = _capture.Capture(
                protection.fileno() if protection is not None else -1,
                self._stop_fd,
                pid,
                [
                    (
                        block.hva,
                        block.pages,
                        -(-block.used_length_bytes // _TARGET_PAGE_BYTES),
                        block.page_size_bytes,
                        # Private memory is only in the VMM's page tables, so read it there.
                        fd if fd is not None and block.shared else -1,
                        block.backing_offset_bytes,
                        # A chunk with a hole in it is nothing unusual: see _count_blocks.
                        int(block.shared and block.backing != "hugetlbfs" and not self._in_chunks),
                        block.idstr.encode(),
                    )
                    for block, fd in zip(self._blocks, self._readers, strict=True)
                ],
                slab_bytes=self._slab_bytes,
                spill_slabs=self._spill_bytes // self._slab_bytes,
                max_window_bytes=_MAX_WINDOW_BYTES,
                by_signal=self._in_chunks,
            )
            self._core.grow_spill(
                max(2, min(self._spill_bytes, _FIRST_SPILL_BYTES) // self._slab_bytes)
            )
        except BaseException:
            self._close_descriptors()
            raise

    @property
    def spill_bytes(self) -> int:
        return self._spill_bytes

    def _open_file(self, block: RamBlock) -> int | None:
        if not block.shared and block.backing_fd is None and block.backing_path is None:
            return None
        try:
            # Opened anew: a duplicate would share the VMM's file position.
            fd = os.open(file_behind(block, self._pid), os.O_RDONLY | os.O_CLOEXEC)
        except OSError as error:
            raise HostError(
                f"the memory behind {block.idstr} cannot be opened",
                why=error.strerror,
                remedy="run as root",
                guest_state="running",
            ) from error
        self._files.append(fd)
        return fd

    def register(self) -> None:
        """Register every block; the kernel still lets all writes pass."""
        if self._protection is None:
            raise InternalError("no protection to register RAM with", guest_state="running")
        for index, block in enumerate(self._blocks):
            length_bytes = block.pages * block.page_size_bytes
            self._protection.register(block.hva, length_bytes)
            self._registered[index] = length_bytes

    def start(self) -> None:
        """Start the fault thread; from now on writes to protected pages are served."""
        self._thread = threading.Thread(target=self._serve, name="stillframe-faults", daemon=True)
        self._thread.start()
        self._spill_thread = threading.Thread(
            target=self._core.spill_loop, name="stillframe-spill", daemon=True
        )
        self._spill_thread.start()

    def _serve(self) -> None:
        # Real-time where we may: a vCPU waits for this thread. It never spins (sf_wait_briefly),
        # and serves a fault in well under a millisecond. Else at normal priority.
        with contextlib.suppress(PermissionError):
            os.sched_setscheduler(0, os.SCHED_FIFO, os.sched_param(1))
        self._core.fault_loop()  # its error is in the statistics: see check

    def arm(self) -> float:
        """Protect all RAM while the guest runs, and learn which pages are populated.

        A write from now on un-protects its page and is noted; what was written meanwhile is
        protected again, while that shrinks.

        Returns:
            How long it took, milliseconds.
        """
        began = time.monotonic()
        self._armed = True
        self._protect_all()
        self.learn_population()
        before = None
        for _ in range(_SETTLE_PASSES):
            pages = self.protect_written()
            if pages <= _SETTLED_PAGES or (before is not None and pages > before // 2):
                break
            before = pages
        return (time.monotonic() - began) * 1e3

    def _protect_all(self) -> None:
        for index, block in enumerate(self._blocks):
            step = max(1, _PROTECT_STEP_BYTES // block.page_size_bytes)
            for first in range(0, block.pages, step):
                self._check(
                    self._core.protect(index, first, min(step, block.pages - first)),
                    f"protecting {block.idstr}",
                )
                self.check()  # faults that nobody serves would also keep the VM from stopping

    def learn_population(self) -> None:
        """Find out which pages were ever populated; the others are not read."""
        for index, block in enumerate(self._blocks):
            mark_populated(self._core, index, block, self._pid, self._readers[index])

    def protect_written(self) -> int:
        """Protect again what was written since it was protected; returns the pages.

        Without arming, this protects everything.
        """
        if not self._armed:
            self._armed = True
            self._protect_all()
            self.learn_population()
        return self._check(self._core.protect_noted(), "protecting what was written")

    def track_finely(self) -> None:
        """Before ``arm``: ``take_written`` tells of little more than what was written, where the
        kernel protects single pages. Else a guest that writes here and there would seem to write
        16 times as much, and precopy would never come to its end."""
        self._core.track_finely()

    def take_written(self) -> list[tuple[int, int, int]]:
        """What was written since it was protected (or taken last), protected again by now.

        For tracking while the guest runs, after ``arm``: a write that is not in the answer is
        in the next one. Who reads the pages now reads at least what the answer tells of.

        Returns:
            Runs (index of the block, first page, pages), in target pages, within the block.

        Raises:
            MachineError, HostError, InternalError: RAM could not be protected.
        """
        taken = self._core.take_noted()
        if isinstance(taken, int):
            self._check(taken, "protecting what was written")
            return []
        runs = []
        for index, first, pages in taken:
            block = self._blocks[index]
            scale = block.page_size_bytes // _TARGET_PAGE_BYTES
            whole = -(-block.used_length_bytes // _TARGET_PAGE_BYTES)
            runs.append((index, first * scale, min(pages * scale, whole - first * scale)))
        return runs

    def instant(self) -> tuple[StoppedWrite, ...]:
        """Fix the instant: from its return on, every page is saved before it changes.

        The guest must be stopped, and the monitor must not be used meanwhile: a thread of
        the VMM that writes to RAM waits here, for microseconds.

        Returns:
            RAM that was written since the last ``protect_written``, by the VMM itself.
        """
        self._core.set_phase(_capture.PHASE_HOLD)
        runs = self._core.noted_runs()
        self.protect_written()
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
        """Buffers of one worker thread; ``next`` gives the next batch of the sweep or spill.

        Args:
            section_id: id of the stream's ``ram`` section; the same for all workers.
        """
        self._core.set_section_id(section_id)
        return _capture.Worker(self._core)

    def check(self) -> None:
        """Raise if the snapshot can no longer show one instant.

        Raises:
            SnapshotFailed: RAM was dropped or unmapped before it was copied.
            MachineError: the VM exited.
        """
        numbers = self._core.statistics()
        if numbers["lost"]:
            kind, hva, length_bytes = numbers["lost"]
            raise SnapshotFailed(
                "the snapshot would not show one instant",
                why=f"{_LOST[kind]}: {self._name(hva)}, {length_bytes} bytes",
                remedy="take another one, with the balloon and memory hotplug at rest",
                guest_state="running",
            )
        for index, now in self._count_blocks().items():
            if now < self._blocks_used.get(index, 0):
                raise SnapshotFailed(
                    "the snapshot would not show one instant",
                    why=f"{_LOST[_capture.LOST_HOLE]}: {self._blocks[index].idstr}",
                    remedy="take another one, with the balloon and memory hotplug at rest",
                    guest_state="running",
                )
        self._check(numbers["error"], "copying guest RAM")

    def _count_blocks(self) -> dict[int, int]:
        # The kernel tells nobody about a huge page that is punched out of its file, and has
        # no way to look for the hole; the file's size on its file system shows it. So too
        # where RAM is protected in chunks, which may have holes from the beginning.
        return {
            index: os.fstat(fd).st_blocks
            for index, (block, fd) in enumerate(zip(self._blocks, self._readers, strict=True))
            if block.shared and fd is not None and (block.backing == "hugetlbfs" or self._in_chunks)
        }

    def _name(self, hva: int) -> str:
        for block in self._blocks:
            if block.hva <= hva < block.hva + block.max_length_bytes:
                return f"{block.idstr} at offset {hva - block.hva:#x}"
        return f"address {hva:#x}"

    def statistics(self) -> dict[str, Any]:
        return self._core.statistics()

    def finish(self) -> None:
        """After all workers found nothing more: end the protection, then the fault thread."""
        # Every page is claimed by now, and done but for those of one fault under way:
        # unregistering would wake its writer in the middle of the copy.
        self._core.await_fault()
        self._unregister()
        self._stop_thread()
        self._core.flush()

    def release(self) -> None:
        """Give up: let every write pass without a copy. May be called at any time."""
        self._core.set_phase(_capture.PHASE_RELEASE)
        self._unregister()

    def _unregister(self) -> None:
        # In steps: the kernel clears a range under the lock that page faults need, and
        # the guest would wait for all of it at once.
        for index, block in enumerate(self._blocks):
            step = max(1, _UNREGISTER_STEP_BYTES // block.page_size_bytes)
            pages = self._registered[index] // block.page_size_bytes
            self._registered[index] = 0
            for first in range(0, pages, step):
                # A failure means that the range is gone (the VM exited, or unplugged it).
                self._core.unregister(index, first, min(step, pages - first))

    def _stop_thread(self) -> None:
        if self._thread is not None:
            os.eventfd_write(self._stop_fd, 1)
            self._thread.join()
            self._thread = None
        if self._spill_thread is not None:
            self._core.end_spill()
            self._spill_thread.join()
            self._spill_thread = None

    def close(self) -> None:
        """Close the protection and everything else; the kernel wakes whoever still waits."""
        self._core.set_phase(_capture.PHASE_RELEASE)  # else the thread may wait for room
        self._stop_thread()
        if self._protection is not None:
            self._protection.close()
        self._close_descriptors()

    def _close_descriptors(self) -> None:
        for fd in self._files:
            os.close(fd)
        self._files.clear()
        if self._stop_fd >= 0:
            os.close(self._stop_fd)
            self._stop_fd = -1

    def _check(self, result: int, doing: str) -> int:
        if result >= 0:
            return result
        number = -result
        if number in (errno.ESRCH, errno.EFAULT, errno.EIO, errno.ENOENT):
            raise MachineError(
                f"{doing} failed",
                why="the VM exited, or a part of its RAM was removed",
                guest_state="unknown",
            )
        if number == errno.ENOMEM:
            raise HostError(
                f"{doing} failed", why="the host is out of memory", guest_state="running"
            )
        raise InternalError(f"{doing} failed", why=os.strerror(number), guest_state="running")


def _refuse_gigantic(blocks: Sequence[RamBlock]) -> None:
    for block in blocks:
        if block.page_size_bytes > MOST_PAGE_BYTES:
            raise RefusedError(
                f"{block.idstr} has huge pages of {block.page_size_bytes >> 20} MiB",
                why="each page is copied in one piece before the guest may write to it",
                remedy="use --mode stop, or smaller huge pages",
            )
