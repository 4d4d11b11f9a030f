"""Write protection by mprotect(2) and a SIGSEGV handler, for hosts that allow no userfaultfd.

The 2018 patch series worked this way. The handler (``_signal_faults.h``, which states its rules and
limits) reports faults as ``struct uffd_msg`` through a pipe, so a capture's fault thread reads the
pipe like a userfaultfd. There are no events for RAM that is dropped or unmapped.
"""

from __future__ import annotations

import errno
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Literal

from stillframe.capture import _capture
from stillframe.errors import BusyError, HostError
from stillframe.model import RamBlock

LEAST_CHUNK_BYTES = 64 << 10
_MAX_MAP_COUNT = Path("/proc/sys/vm/max_map_count")
_USUAL_MAP_COUNT = 65530
_SHARE_OF_MAPS = 3
"""At most this part of the process's mappings may come from splitting guest RAM."""


class SignalProtection:
    """One capture's protection, for memory of this process only."""

    kind: Literal["mprotect"] = "mprotect"

    def __init__(self) -> None:
        """Raises HostError: no file descriptors."""
        try:
            self._read_fd, self._write_fd = os.pipe2(os.O_CLOEXEC | os.O_NONBLOCK)
        except OSError as error:
            raise HostError("no pipe for faults", why=error.strerror) from error

    def fileno(self) -> int:
        return self._read_fd

    def register(self, hva: int, length_bytes: int) -> None:
        """Register a range, which stays writable. Install the handler, or reinstall it if another
        one was installed over it.

        Raises:
            BusyError: another capture protects the range.
            HostError: too many ranges, or the handler cannot be installed.
        """
        result = _capture.signal_register(hva, length_bytes, self._write_fd)
        if result == -errno.EBUSY:
            raise BusyError(
                "guest RAM is write-protected already",
                why="another snapshot or migration is under way",
                remedy="wait for it to end",
                guest_state="running",
            )
        if result < 0:
            raise HostError(
                f"guest RAM at {hva:#x} cannot be write-protected",
                why=os.strerror(-result),
                guest_state="running",
            )

    def close(self) -> None:
        """Make all ranges writable and wake waiting threads; call it before RAM is unmapped."""
        if self._write_fd >= 0:
            _capture.signal_release(self._write_fd)
            os.close(self._write_fd)
            os.close(self._read_fd)
            self._write_fd = self._read_fd = -1


def prepare_thread() -> None:
    """Give the calling thread an alternate stack for its faults (sigaltstack(2)), until it ends.

    Not needed if the stack has some KiB left at each write to guest RAM. A thread that blocks
    SIGSEGV needs it: the kernel kills the process at a fault of such a thread.

    Raises:
        HostError: no memory for the stack.
    """
    result = _capture.signal_prepare_thread()
    if result < 0:
        raise HostError("no stack for the handling of faults", why=os.strerror(-result))


def chunk_bytes(ram_bytes: int) -> int:
    """Return the smallest chunk, bytes, in which this much RAM may be protected: each chunk may
    become a separate mapping, and the kernel limits their number (vm.max_map_count)."""
    try:
        most = int(_MAX_MAP_COUNT.read_text())
    except (OSError, ValueError):
        most = _USUAL_MAP_COUNT
    chunk = LEAST_CHUNK_BYTES
    while ram_bytes > chunk * (most // _SHARE_OF_MAPS):
        chunk *= 2
    return chunk


def chunks_of(blocks: Sequence[RamBlock]) -> list[int]:
    """Return the chunk size of each block, bytes: ``chunk_bytes`` of all blocks together, reduced
    where a chunk would extend beyond the block's mapping."""
    wanted = chunk_bytes(sum(block.used_length_bytes for block in blocks))
    pieces = []
    for block in blocks:
        piece = max(wanted, block.page_size_bytes)
        while (
            piece > block.page_size_bytes
            and -(-block.used_length_bytes // piece) * piece > block.max_length_bytes
        ):
            piece //= 2
        pieces.append(piece)
    return pieces
