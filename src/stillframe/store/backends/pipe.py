"""A sink that writes to a pipe or to standard output."""

from __future__ import annotations

import os
import select
import stat

from stillframe.errors import UsageError
from stillframe.still.frames import BytesLike
from stillframe.store.backends.oserrors import sink_error


class PipeSink:
    """Writer to an open file descriptor, which the caller keeps owning.

    A pipe has no name to withhold: its reader sees an aborted snapshot as a truncated one, which
    every reader of the format refuses.

    Args:
        fd: a pipe, socket or file that is open for writing.
        description: its name in error messages.

    Raises:
        UsageError: it is a terminal.
        SinkError: it is not open.
    """

    def __init__(self, fd: int, *, description: str = "standard output") -> None:
        self._fd = fd
        self._description = description
        self._state = "open"
        try:
            self._is_file = stat.S_ISREG(os.fstat(fd).st_mode)
        except OSError as error:
            raise sink_error("write to", description, error) from error
        if os.isatty(fd):
            raise UsageError(f"{description} is a terminal", remedy="send it to a file or a pipe")

    @property
    def description(self) -> str:
        return self._description

    def write(self, data: BytesLike) -> None:
        """Write ``data``; blocks until the reader has taken it.

        Raises:
            SinkError: the reader went away, or the disk behind a redirection is full.
        """
        self._check_open()
        rest = memoryview(data).cast("B")
        try:
            while rest:
                try:
                    rest = rest[os.write(self._fd, rest) :]
                except BlockingIOError:
                    waiter = select.poll()
                    waiter.register(self._fd, select.POLLOUT)
                    waiter.poll()
        except OSError as error:
            raise sink_error("write to", self._description, error) from error

    def commit(self) -> None:
        """Sync the descriptor if it is a regular file.

        Raises:
            SinkError: the file could not be synced.
        """
        self._check_open()
        self._state = "committed"
        if self._is_file:
            try:
                os.fsync(self._fd)
            except OSError as error:
                raise sink_error("finish", self._description, error) from error

    def abort(self) -> None:
        """Write nothing more."""
        if self._state == "open":
            self._state = "aborted"

    def _check_open(self) -> None:
        if self._state != "open":
            raise UsageError(f"{self._description} is already {self._state}")


def standard_output() -> PipeSink:
    """Return a sink to standard output, for ``take``, ``export`` and ``import_stream``.

    Raises:
        UsageError: it is a terminal. SinkError: it is closed.
    """
    return PipeSink(1)
