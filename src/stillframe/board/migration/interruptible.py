"""Reading and writing a descriptor in a way that another thread can end at any moment."""

from __future__ import annotations

import os
import select
import threading
from contextlib import suppress

from stillframe.errors import SinkError
from stillframe.still.frames import BytesLike


class Interrupt:
    """Ends what waits on descriptors; once set it stays set."""

    def __init__(self) -> None:
        self._fd = os.eventfd(0, os.EFD_CLOEXEC | os.EFD_NONBLOCK)
        self._set = False
        self._lock = threading.Lock()

    @property
    def is_set(self) -> bool:
        return self._set

    def set(self) -> None:
        """From any thread, any number of times, also after ``close``."""
        with self._lock:  # else a late call could write to whatever has the number by then
            self._set = True
            if self._fd >= 0:
                os.eventfd_write(self._fd, 1)

    def fileno(self) -> int:
        return self._fd

    def close(self) -> None:
        """When nobody waits any more."""
        with self._lock:
            fd, self._fd = self._fd, -1
            if fd >= 0:
                os.close(fd)


class InterruptibleFd:
    """A pipe, socket or file of ours that is read and written without blocking in the kernel.

    Args:
        fd: owned from here on; made non-blocking.
        description: what error messages call it, such as ``socket``.
    """

    def __init__(self, fd: int, interrupt: Interrupt, *, description: str) -> None:
        self._fd = fd
        self._interrupt = interrupt
        self._description = description
        self.was_reset = False
        """Whether the other side closed before it had read everything."""
        os.set_blocking(fd, False)

    def fileno(self) -> int:
        return self._fd

    def read(self, size: int, /) -> bytes:
        """Up to ``size`` bytes as soon as there are any; none at the end, when the other side is
        gone, or when interrupted.

        Raises:
            OSError: the medium cannot be read.
        """
        while True:
            if self._interrupt.is_set:
                return b""
            try:
                return os.read(self._fd, size)
            except BlockingIOError:
                self._wait(select.POLLIN)
            except ConnectionResetError:
                self.was_reset = True
                return b""

    def write(self, data: BytesLike) -> None:
        """All of ``data``, waiting for the other side as long as it takes.

        Raises:
            SinkError: the other side went away, the disk is full, or it was interrupted.
        """
        rest = memoryview(data).cast("B")
        while rest:
            if self._interrupt.is_set:
                raise SinkError(f"Unable to write to {self._description}", why="it was cancelled")
            try:
                rest = rest[os.write(self._fd, rest) :]
            except BlockingIOError:
                self._wait(select.POLLOUT)
            except OSError as error:
                raise SinkError(
                    f"Unable to write to {self._description}", why=error.strerror
                ) from error

    def _wait(self, event: int) -> None:
        wait_for(self._fd, event, self._interrupt)

    def close(self) -> None:
        """Never raises."""
        fd, self._fd = self._fd, -1
        if fd >= 0:
            with suppress(OSError):
                os.close(fd)


def wait_for(fd: int, event: int, interrupt: Interrupt) -> None:
    """Until ``event`` (of select.poll) or an error is there for ``fd``, or the interrupt is set."""
    poll = select.poll()
    poll.register(fd, event)
    poll.register(interrupt.fileno(), select.POLLIN)
    poll.poll()
