"""Starts a file's way to the disk while it is still being written, and tells how far it is.

So the last fsync has little to do, and whoever fills the file sees whether the disk or the filling
is what takes the time. Source: sync_file_range(2).
"""

from __future__ import annotations

import ctypes
import os
import threading
from typing import Final

WINDOW_BYTES: Final = 8 << 20

_WRITE = 2
_WAIT_AFTER = 4


class Writeback:
    """A thread that writes windows of a file out, one after the other, and waits for each.

    Errors are left to fsync of the writer's descriptor. The kernel reports an error once to each
    open file description, and waiting counts as reporting; so this opens one of its own.
    """

    def __init__(self, fd: int) -> None:
        self._fd = os.open(f"/proc/self/fd/{fd}", os.O_WRONLY | os.O_CLOEXEC)
        self._changed = threading.Condition()
        self._written_bytes = 0
        self._on_disk_bytes = 0
        self._ended = False
        self._thread: threading.Thread | None = None

    @property
    def backlog_bytes(self) -> int:
        """What was written to the file, and is not on the disk yet."""
        return self._written_bytes - self._on_disk_bytes

    def wrote(self, length_bytes: int) -> None:
        """The file has grown."""
        with self._changed:
            self._written_bytes += length_bytes
            if self._written_bytes - self._on_disk_bytes >= WINDOW_BYTES:
                if self._thread is None:
                    self._thread = threading.Thread(
                        target=self._run, name="stillframe-writeback", daemon=True
                    )
                    self._thread.start()
                self._changed.notify()

    def _run(self) -> None:
        libc = ctypes.CDLL(None)
        while True:
            with self._changed:
                while not self._ended and self.backlog_bytes < WINDOW_BYTES:
                    self._changed.wait()
                if self._ended:
                    return
                offset, length = self._on_disk_bytes, self.backlog_bytes
                length -= length % WINDOW_BYTES
            libc.sync_file_range(
                self._fd,
                ctypes.c_int64(offset),
                ctypes.c_int64(length),
                ctypes.c_uint(_WRITE | _WAIT_AFTER),
            )
            with self._changed:
                self._on_disk_bytes += length

    def end(self) -> None:
        """End the thread; it must not be used after that."""
        with self._changed:
            self._ended = True
            self._changed.notify()
        if self._thread is not None:
            self._thread.join()
            self._thread = None
        if self._fd >= 0:
            os.close(self._fd)
            self._fd = -1
