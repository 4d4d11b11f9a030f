"""Captures of this process's own memory, for tests of the core that need no other process."""

from __future__ import annotations

import contextlib
import ctypes
import mmap
import os
import threading
from collections.abc import Iterator, Sequence
from typing import Literal

from stillframe.board.memory.own_protection import open_own_protection
from stillframe.capture import _capture
from stillframe.capture.write_protection import WriteProtection
from tests.support.capture_oracle import OracleBlock


def address_of(mapping: mmap.mmap) -> int:
    """Where a mapping is."""
    return ctypes.addressof(ctypes.c_char.from_buffer(mapping))


class OwnBlock:
    """Anonymous memory of ours that stands in for a RAM block."""

    def __init__(self, block: OracleBlock) -> None:
        self.oracle = block
        length = max(len(block.content), 1)
        # Room to align it as a huge page would be.
        self._map = mmap.mmap(-1, length + block.page_bytes, mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
        self._map.madvise(mmap.MADV_NOHUGEPAGE)
        base = address_of(self._map)
        self.hva = -(-base // block.page_bytes) * block.page_bytes
        at = self.hva - base
        for page in range(block.pages):
            start = page * block.page_bytes
            content = block.content[start : start + block.page_bytes]
            if page in block.populated:
                self._map[at + start : at + start + block.page_bytes] = content

    def write(self, page: int, value: int) -> None:
        # A foreign call: the interpreter's lock is not held while it faults.
        ctypes.memset(self.hva + page * self.oracle.page_bytes, value, 8)

    def for_core(self) -> tuple[int, int, int, int, int, int, int, bytes]:
        block = self.oracle
        return (
            self.hva,
            block.pages,
            block.target_pages,
            block.page_bytes,
            -1,
            0,
            0,
            block.idstr,
        )


def core_for(
    blocks: Sequence[OwnBlock],
    *,
    slab_bytes: int,
    max_window_bytes: int,
    spill_slabs: int = 64,
    protection: WriteProtection | None = None,
    stop_fd: int = -1,
) -> _capture.Capture:
    """The native core over these blocks, with their population told to it."""
    core = _capture.Capture(
        protection.fileno() if protection is not None else -1,
        stop_fd,
        os.getpid(),
        [block.for_core() for block in blocks],
        slab_bytes=slab_bytes,
        spill_slabs=spill_slabs,
        max_window_bytes=max_window_bytes,
        by_signal=protection is not None and protection.kind == "mprotect",
    )
    core.grow_spill(spill_slabs)
    core.set_section_id(2)
    for index, block in enumerate(blocks):
        for page in block.oracle.populated:
            core.mark_populated(index, page, 1)
    return core


@contextlib.contextmanager
def protected(
    blocks: Sequence[OwnBlock],
    *,
    slab_bytes: int,
    max_window_bytes: int,
    spill_slabs: int = 64,
    kind: Literal["userfaultfd", "mprotect"] = "userfaultfd",
) -> Iterator[_capture.Capture]:
    """As ``core_for``, protected, active, and with its fault thread running."""
    stop_fd = os.eventfd(0, os.EFD_CLOEXEC | os.EFD_NONBLOCK)
    protection = open_own_protection(kind)
    try:
        core = core_for(
            blocks,
            slab_bytes=slab_bytes,
            max_window_bytes=max_window_bytes,
            spill_slabs=spill_slabs,
            protection=protection,
            stop_fd=stop_fd,
        )
        for index, block in enumerate(blocks):
            protection.register(block.hva, len(block.oracle.content))
            assert core.protect(index, 0, block.oracle.pages) == 0
        core.set_phase(_capture.PHASE_ACTIVE)
        thread = threading.Thread(target=core.fault_loop, daemon=True)
        thread.start()
        try:
            yield core
        finally:
            core.set_phase(_capture.PHASE_RELEASE)
            os.eventfd_write(stop_fd, 1)
            thread.join()
    finally:
        protection.close()
        os.close(stop_fd)


def end_of_faults(core: _capture.Capture, blocks: Sequence[OwnBlock]) -> None:
    """What ``RamCapture.finish`` does, but for ending the thread."""
    core.await_fault()
    for index, block in enumerate(blocks):
        core.unregister(index, 0, block.oracle.pages)
    core.flush()


def batches(core: _capture.Capture) -> list[tuple[bytes, bytes]]:
    """All that one worker finds: (section, index runs) of each batch."""
    worker = _capture.Worker(core)
    found = []
    while worker.next():
        found.append((bytes(worker.raw), worker.runs))
    return found
