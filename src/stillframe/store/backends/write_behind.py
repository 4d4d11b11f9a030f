"""Background writing of file data.

A thread writes whole buffers with O_DIRECT (open(2)): through the page cache, a snapshot of many
GiB would evict other programs' data, and the copy takes as long as the compression. On file systems
without O_DIRECT, buffers go through the page cache and are flushed at once (sync_file_range(2)).
"""

from __future__ import annotations

import ctypes
import errno
import fcntl
import mmap
import os
import threading
from collections import deque
from typing import Final

from stillframe.still.frames import BytesLike

BUFFER_BYTES: Final = 4 << 20
_BUFFERS = 4
"""One being filled, one being written, and two to absorb differences in pace."""

_WRITE = 2
_WAIT_AFTER = 4


class WriteBehind:
    """Appender to an empty file. For one thread at a time; the caller syncs the file at the end.

    Args:
        fd: the file, owned by the caller. O_DIRECT may be set on it in the meantime.
    """

    def __init__(self, fd: int) -> None:
        self._fd = fd
        self._direct = False
        self._changed = threading.Condition()
        self._free: list[mmap.mmap] = []
        self._made = 0
        self._full: deque[mmap.mmap] = deque()
        self._filling: mmap.mmap | None = None
        self._filled_bytes = 0
        self._taken_bytes = 0
        self._on_disk_bytes = 0
        self._error: OSError | None = None
        self._ended = False
        self._thread: threading.Thread | None = None

    def write(self, data: BytesLike) -> None:
        """Append ``data``; blocks while the disk is several buffers behind.

        Raises:
            OSError: this or an earlier write failed.
        """
        rest = memoryview(data).cast("B")
        while rest:
            buffer = self._filling
            if buffer is None:
                buffer = self._filling = self._vacant()
            at = self._filled_bytes
            part = min(len(rest), BUFFER_BYTES - at)
            buffer[at : at + part] = rest[:part]
            rest = rest[part:]
            self._filled_bytes += part
            self._taken_bytes += part
            if self._filled_bytes == BUFFER_BYTES:
                self._hand_over(buffer)

    def finish(self) -> None:
        """Wait for the background writes, then write the rest in the calling thread.

        Raises:
            OSError: a write failed.
        """
        with self._changed:
            while self._error is None and self._on_disk_bytes + BUFFER_BYTES <= self._taken_bytes:
                self._changed.wait()
            self._check()
        if self._filling is not None:
            self._use_page_cache()  # takes any length
            self._put(memoryview(self._filling)[: self._filled_bytes])

    def end(self) -> None:
        """Stop the thread and discard unwritten data. The object must not be used afterwards."""
        with self._changed:
            self._ended = True
            self._changed.notify_all()
        if self._thread is not None:
            self._thread.join()
            self._thread = None
        self._free.clear()
        self._full.clear()
        self._filling = None

    def _check(self) -> None:
        if self._error is not None:
            raise self._error

    def _vacant(self) -> mmap.mmap:
        with self._changed:
            while not self._free and self._made == _BUFFERS and self._error is None:
                self._changed.wait()
            self._check()
            if self._free:
                return self._free.pop()
            self._made += 1
        return mmap.mmap(-1, BUFFER_BYTES)  # page-aligned, as O_DIRECT requires

    def _hand_over(self, buffer: mmap.mmap) -> None:
        self._filling = None
        self._filled_bytes = 0
        with self._changed:
            self._full.append(buffer)
            if self._thread is None:
                self._pass_page_cache()
                self._thread = threading.Thread(
                    target=self._run, name="stillframe-write-behind", daemon=True
                )
                self._thread.start()
            self._changed.notify_all()

    def _run(self) -> None:
        while (buffer := self._next()) is not None:
            try:
                self._put(memoryview(buffer))
                if not self._direct:
                    self._flush(self._on_disk_bytes)
            except OSError as error:
                with self._changed:
                    self._error = error
                    self._changed.notify_all()
                return
            with self._changed:
                self._on_disk_bytes += BUFFER_BYTES
                self._free.append(buffer)
                self._changed.notify_all()

    def _next(self) -> mmap.mmap | None:
        with self._changed:
            while not self._full and not self._ended:
                self._changed.wait()
            return None if self._ended else self._full.popleft()

    def _put(self, rest: memoryview) -> None:
        offset_bytes = self._on_disk_bytes
        while rest:
            try:
                done = os.pwrite(self._fd, rest, offset_bytes)
            except OSError as error:
                if error.errno != errno.EINVAL or not self._direct:
                    raise
                self._use_page_cache()  # refused: alignment or length
                continue
            rest = rest[done:]
            offset_bytes += done

    def _pass_page_cache(self) -> None:
        self._direct = _set_direct(self._fd, True)

    def _use_page_cache(self) -> None:
        if self._direct:
            _set_direct(self._fd, False)
            self._direct = False

    def _flush(self, offset_bytes: int) -> None:
        # The kernel reports a write error once per open file description, and waiting counts as
        # reporting. Wait on a separate one, so that the caller's fsync still gets the error.
        fd = os.open(f"/proc/self/fd/{self._fd}", os.O_WRONLY | os.O_CLOEXEC)
        try:
            ctypes.CDLL(None).sync_file_range(
                fd,
                ctypes.c_int64(offset_bytes),
                ctypes.c_int64(BUFFER_BYTES),
                ctypes.c_uint(_WRITE | _WAIT_AFTER),
            )
        finally:
            os.close(fd)


def _set_direct(fd: int, wanted: bool) -> bool:
    """Set or clear O_DIRECT; return whether it is set."""
    flags = fcntl.fcntl(fd, fcntl.F_GETFL) & ~os.O_DIRECT
    try:
        fcntl.fcntl(fd, fcntl.F_SETFL, flags | os.O_DIRECT if wanted else flags)
    except OSError:
        return False
    return wanted
