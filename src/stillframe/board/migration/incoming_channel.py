"""Channels to read a migration from.

A socket listens before the command that asked for it is answered, and accepts one source. A
snapshot file yields the stream stored in it.
"""

from __future__ import annotations

import os
import select
import socket
import stat
from collections.abc import Iterator
from typing import Protocol

from stillframe.board.migration.addresses import (
    Address,
    FdAddress,
    FdsetAddress,
    FileAddress,
    TcpAddress,
    UnixAddress,
)
from stillframe.board.migration.interruptible import Interrupt, InterruptibleFd, wait_for
from stillframe.board.monitor.descriptors import Descriptors
from stillframe.errors import HostError, NotFoundError, UsageError
from stillframe.qmp.listening import listen
from stillframe.still.frames import BytesLike
from stillframe.still.snapshot import Snapshot
from stillframe.store.backends.local_source import LocalSource
from stillframe.store.parents import ParentFiles

_ZSTD_MAGIC = b"\x28\xb5\x2f\xfd"


class IncomingChannel(Protocol):
    """The source of a stream. One thread reads; any thread may reply."""

    @property
    def can_reply(self) -> bool:
        """Whether the channel has a return path to the source."""

    def read(self, size: int, /) -> bytes:
        """Read up to ``size`` bytes; none at the end, or after an interrupt."""

    def reply(self, data: BytesLike, /) -> None:
        """Send ``data`` to the source.

        Raises:
            SinkError: the source is gone.
        """

    def close(self) -> None:
        """Close the channel. Never raises."""


class Arrival(Protocol):
    """A place where a migration will arrive."""

    @property
    def socket_address(self) -> dict[str, str] | None:
        """The address it listens on, as ``query-migrate`` shows it; None if it does not listen."""

    def open(self) -> IncomingChannel | None:
        """Wait for the source; return None if interrupted."""

    def close(self) -> None:
        """Stop listening, or close what was not opened. Never raises."""


class _FdChannel:
    def __init__(self, fd: int, interrupt: Interrupt, *, can_reply: bool) -> None:
        self._fd = InterruptibleFd(fd, interrupt, description="return path")
        self.can_reply = can_reply

    def read(self, size: int, /) -> bytes:
        return self._fd.read(size)

    def reply(self, data: BytesLike, /) -> None:
        self._fd.write(data)

    def close(self) -> None:
        self._fd.close()


class _SnapshotChannel:
    """The stream within a snapshot file."""

    can_reply = False

    def __init__(self, fd: int, path: str) -> None:
        try:
            source = LocalSource(f"/proc/self/fd/{fd}", name=path)
            self._snapshot = Snapshot(source, resolve=ParentFiles())
        finally:
            os.close(fd)
        self._pieces: Iterator[bytes] = self._snapshot.iter_stream()
        self._rest = memoryview(b"")

    def read(self, size: int, /) -> bytes:
        while not self._rest:
            piece = next(self._pieces, None)
            if piece is None:
                return b""
            self._rest = memoryview(piece)
        part, self._rest = self._rest[:size], self._rest[size:]
        return bytes(part)

    def reply(self, data: BytesLike, /) -> None:
        raise HostError("a file cannot be answered")

    def close(self) -> None:
        self._snapshot.close()


class _OpenFile:
    """A descriptor or file that is already open."""

    socket_address: dict[str, str] | None = None

    def __init__(self, fd: int, path: str, interrupt: Interrupt) -> None:
        self._fd = fd
        self._path = path
        self._interrupt = interrupt

    def open(self) -> IncomingChannel | None:
        fd, self._fd = self._fd, -1
        mode = os.fstat(fd).st_mode
        if stat.S_ISREG(mode):
            position = os.lseek(fd, 0, os.SEEK_CUR)
            if position == 0 and os.pread(fd, len(_ZSTD_MAGIC), 0) == _ZSTD_MAGIC:
                return _SnapshotChannel(fd, self._path)
        return _FdChannel(fd, self._interrupt, can_reply=stat.S_ISSOCK(mode))

    def close(self) -> None:
        fd, self._fd = self._fd, -1
        if fd >= 0:
            os.close(fd)


class _Listening:
    def __init__(self, address: TcpAddress | UnixAddress, interrupt: Interrupt) -> None:
        self._interrupt = interrupt
        if isinstance(address, UnixAddress):
            self._listener = listen(address.path)
            self.socket_address: dict[str, str] | None = {"type": "unix", "path": address.path}
        else:
            self._listener = listen((address.host, address.port))
            host, port = self._listener.socket.getsockname()[:2]
            self.socket_address = {"type": "inet", "host": host, "port": str(port)}
        self._listener.socket.setblocking(False)

    def open(self) -> IncomingChannel | None:
        sock = self._listener.socket
        while True:
            wait_for(sock.fileno(), select.POLLIN, self._interrupt)
            if self._interrupt.is_set:
                return None
            try:
                connection, _ = sock.accept()
            except (BlockingIOError, ConnectionAbortedError):
                continue
            self.close()
            if connection.family != socket.AF_UNIX:
                connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
            return _FdChannel(connection.detach(), self._interrupt, can_reply=True)

    def close(self) -> None:
        self._listener.close()


def expect(address: Address, descriptors: Descriptors, interrupt: Interrupt) -> Arrival:
    """Listen at, or open, the place where a migration will arrive.

    Raises:
        HostError, BusyError: the address cannot be listened on, or the file not be read.
        NotFoundError: no such file or descriptor.
        UsageError: the address is bad, or its path is not a socket (``unix:``) or not a regular
            file (``file:``).
    """
    match address:
        case TcpAddress() | UnixAddress():
            return _Listening(address, interrupt)
        case FdAddress(name):
            return _OpenFile(descriptors.take(name), f"fd:{name}", interrupt)
        case FdsetAddress(fdset_id, offset_bytes):
            fd = descriptors.open_fdset(fdset_id, os.O_RDONLY)
            path = f"/dev/fdset/{fdset_id}"
        case FileAddress(path, offset_bytes):
            fd = _open_file(path)
    if offset_bytes:
        try:
            os.lseek(fd, offset_bytes, os.SEEK_SET)
        except OSError as error:
            os.close(fd)
            raise HostError(
                f"cannot read {path} from offset {offset_bytes} on", why=error.strerror
            ) from error
    return _OpenFile(fd, path, interrupt)


def _open_file(path: str) -> int:
    try:
        # Non-blocking, so that a named pipe is refused and does not block the open.
        fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC | os.O_NOCTTY | os.O_NONBLOCK)
    except FileNotFoundError as error:
        raise NotFoundError(f"there is no file {path}") from error
    except OSError as error:
        raise HostError(f"cannot read {path}", why=error.strerror) from error
    if not stat.S_ISREG(os.fstat(fd).st_mode):
        os.close(fd)
        raise UsageError(
            f"{path} is not a regular file", remedy="hand over a descriptor: getfd, then fd:NAME"
        )
    return fd
