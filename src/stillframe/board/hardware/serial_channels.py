"""The outer ends of a serial line: the terminal, a file, a unix socket, or nothing."""

from __future__ import annotations

import contextlib
import os
import socket
from typing import Protocol

from stillframe.errors import HostError, StillframeError, UsageError
from stillframe.qmp.listening import listen

_READ_BYTES = 4096
_UNIX = "unix:"


class Channel(Protocol):
    """Descriptors to poll, and what to do when they are ready. For one thread, except ``close``,
    which comes after that thread's end."""

    def input_fd(self) -> int | None:
        """Return the descriptor to poll for reading; None if nothing ever comes in."""

    def output_fd(self) -> int | None:
        """Return the descriptor to poll for writing; None without a peer: output is discarded."""

    def read(self) -> bytes:
        """Return what has arrived; nothing if it was only a connection, or its end."""

    def write(self, data: bytes) -> int:
        """Write a part of ``data``; return how many bytes."""

    def close(self) -> None: ...


class Descriptors:
    """A pair of descriptors, such as standard input and output; None for an unconnected direction.
    The end of the input, or an error on the output, disconnects that direction for good."""

    def __init__(self, input_fd: int | None, output_fd: int | None, *, owned: bool) -> None:
        self._input_fd = input_fd
        self._output_fd = output_fd
        self._owned = (input_fd, output_fd) if owned else ()

    def input_fd(self) -> int | None:
        return self._input_fd

    def output_fd(self) -> int | None:
        return self._output_fd

    def read(self) -> bytes:
        if self._input_fd is None:
            return b""
        try:
            data = os.read(self._input_fd, _READ_BYTES)
        except BlockingIOError:
            return b""
        except OSError:
            data = b""
        if not data:
            self._input_fd = None
        return data

    def write(self, data: bytes) -> int:
        if self._output_fd is None:
            return len(data)
        try:
            return os.write(self._output_fd, data)
        except BlockingIOError:
            return 0
        except OSError:
            self._output_fd = None
            return len(data)

    def close(self) -> None:
        for fd in self._owned:
            if fd is not None:
                os.close(fd)


class UnixSocket:
    """A listening unix socket, for its owner only; serves one client after the other."""

    def __init__(self, path: str) -> None:
        """
        Raises:
            BusyError, UsageError, HostError: as ``qmp.listening.listen``.
        """
        self._client: socket.socket | None = None
        try:
            self._listener = listen(path)
        except StillframeError as error:
            error.what = f"the serial line: {error.what}"
            raise
        self._listener.socket.setblocking(False)

    def input_fd(self) -> int | None:
        return (self._client or self._listener.socket).fileno()

    def output_fd(self) -> int | None:
        return None if self._client is None else self._client.fileno()

    def read(self) -> bytes:
        if self._client is None:
            self._accept()
            return b""
        try:
            data = self._client.recv(_READ_BYTES)
        except BlockingIOError:
            return b""
        except OSError:
            data = b""
        if not data:
            self._hang_up()
        return data

    def write(self, data: bytes) -> int:
        self._accept()  # a client that is already connecting misses nothing
        if self._client is None:
            return len(data)
        try:
            return self._client.send(data)
        except BlockingIOError:
            return 0
        except OSError:
            self._hang_up()
            return len(data)

    def _accept(self) -> None:
        if self._client is None:
            with contextlib.suppress(OSError):
                self._client, _ = self._listener.socket.accept()
                self._client.setblocking(False)

    def _hang_up(self) -> None:
        if self._client is not None:
            self._client.close()
            self._client = None

    def close(self) -> None:
        self._hang_up()
        self._listener.close()


def open_channel(serial: str) -> Channel:
    """Open what a board's ``serial`` names: ``stdio``, ``none``, ``unix:PATH``, or a file's path.

    Raises:
        UsageError: it is empty, or not a path for a socket. BusyError: another program listens
            there. HostError: it cannot be opened.
    """
    if serial == "none":
        return Descriptors(None, None, owned=False)
    if serial == "stdio":
        return Descriptors(0, 1, owned=False)
    if serial.startswith(_UNIX):
        return UnixSocket(serial.removeprefix(_UNIX))
    if not serial:
        raise UsageError(
            "the serial line needs a place", remedy="say stdio, none, unix:PATH or a file"
        )
    try:
        flags = os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_CLOEXEC | os.O_NONBLOCK
        return Descriptors(None, os.open(serial, flags, 0o600), owned=True)
    except OSError as error:
        raise HostError(
            f"the serial line's file {serial} cannot be opened", why=error.strerror
        ) from error
