"""Descriptor reads and writes that another thread can interrupt at any moment."""

from __future__ import annotations

import os
import select
import threading
from contextlib import suppress

from stillframe.errors import SinkError
from stillframe.still.frames import BytesLike


class Interrupt:
    """A flag that ends all waits on its descriptors; once set, it stays set."""

    def __init__(self) -> None:
        self._fd = os.eventfd(0, os.EFD_CLOEXEC | os.EFD_NONBLOCK)
        self._set = False
        self._lock = threading.Lock()

    @property
    def is_set(self) -> bool:
        return self._set

    def set(self) -> None:
        """Set the flag: from any thread, any number of times, even after ``close``."""
        with self._lock:  # or a late call could write to a reused descriptor number
            self._set = True
            if self._fd >= 0:
                os.eventfd_write(self._fd, 1)

    def fileno(self) -> int:
        return self._fd

    def close(self) -> None:
        """Close the event; no thread may wait on it any more."""
        with self._lock:
            fd, self._fd = self._fd, -1
            if fd >= 0:
                os.close(fd)


class InterruptibleFd:
    """A pipe, socket or file whose reads and writes an ``Interrupt`` ends.

    Args:
        fd: owned by this object from here on, and made non-blocking.
        description: its name in error messages, such as ``socket``.
    """

    def __init__(self, fd: int, interrupt: Interrupt, *, description: str) -> None:
        self._fd = fd
        self._interrupt = interrupt
        self._description = description
        self.was_reset = False
        """Whether the peer closed before it had read everything."""
        os.set_blocking(fd, False)

    def fileno(self) -> int:
        return self._fd

    def read(self, size: int, /) -> bytes:
        """Wait for data and read up to ``size`` bytes; none at the end, when the peer is gone, or
        after an interrupt.

        Raises:
            OSError: the descriptor cannot be read.
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
        """Write all of ``data``, waiting for the peer as long as it takes.

        Raises:
            SinkError: the peer is gone, the disk is full, or the write was interrupted.
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
        """Close the descriptor. Never raises."""
        fd, self._fd = self._fd, -1
        if fd >= 0:
            with suppress(OSError):
                os.close(fd)


def wait_for(fd: int, event: int, interrupt: Interrupt) -> None:
    """Wait until ``fd`` has ``event`` (of select.poll) or an error, or the interrupt is set."""
    poll = select.poll()
    poll.register(fd, event)
    poll.register(interrupt.fileno(), select.POLLIN)
    poll.poll()
