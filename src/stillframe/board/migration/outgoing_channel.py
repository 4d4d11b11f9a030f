"""Channels to write a migration to.

A file gets its name only when the migration is complete (``store.backends.local``); a socket also
has a return path.
"""

from __future__ import annotations

import errno
import os
import select
import socket
import stat
from collections.abc import Callable
from typing import NamedTuple, Protocol

from stillframe.board.migration.addresses import (
    Address,
    FdAddress,
    FdsetAddress,
    FileAddress,
    TcpAddress,
    UnixAddress,
)
from stillframe.board.migration.interruptible import Interrupt, InterruptibleFd, wait_for
from stillframe.board.migration.unconfirmed import Peer
from stillframe.board.monitor.descriptors import Descriptors
from stillframe.errors import SinkError, UsageError
from stillframe.qmp.connection import socket_name
from stillframe.still.frames import BytesLike
from stillframe.still.sinks import Sink
from stillframe.store.backends.local import LocalSink
from stillframe.vmstate.source import Source

_RETRY_S = 0.02


class OutgoingChannel(Sink, Protocol):
    """The sink of a stream. One thread writes; another may read the return path.

    An interrupted ``write`` raises SinkError. ``abort`` closes the channel, also after ``commit``.
    """

    @property
    def return_path(self) -> Source | None:
        """The destination's messages, or None if it cannot send any."""

    @property
    def peer(self) -> Peer | None:
        """The other end of a socket; None for files and pipes."""

    @property
    def stores(self) -> bool:
        """Whether this writes a file: no guest starts from it before it is complete."""


class _FileChannel:
    return_path: Source | None = None
    peer: Peer | None = None
    stores = True

    def __init__(self, path: str, interrupt: Interrupt) -> None:
        self._sink = LocalSink(path, overwrite=True)
        self.description = self._sink.description
        self._interrupt = interrupt

    def write(self, data: BytesLike, /) -> None:
        if self._interrupt.is_set:
            raise SinkError(f"Unable to write to {self._sink.description}", why="it was cancelled")
        self._sink.write(data)

    def commit(self) -> None:
        self._sink.commit()

    def abort(self) -> None:
        self._sink.abort()


class _FdChannel:
    def __init__(self, fd: int, interrupt: Interrupt) -> None:
        mode = os.fstat(fd).st_mode
        is_socket = stat.S_ISSOCK(mode)
        self.description = "socket" if is_socket else "file descriptor"
        self._fd = InterruptibleFd(fd, interrupt, description=self.description)
        self.return_path: Source | None = self._fd if is_socket else None
        self.peer = Peer(self._fd, interrupt) if is_socket else None
        self.stores = stat.S_ISREG(mode)

    def write(self, data: BytesLike, /) -> None:
        self._fd.write(data)

    def commit(self) -> None:
        if self.stores:
            try:
                os.fsync(self._fd.fileno())
            except OSError as error:
                raise SinkError(
                    f"Unable to write to {self.description}", why=error.strerror
                ) from error

    def abort(self) -> None:
        self._fd.close()


class Departure(NamedTuple):
    """A destination that was found, but need not be connected yet.

    ``open``: connects to it, until interrupted; raises SinkError if that fails.
    ``close``: releases the destination, even if it was opened; never raises.
    """

    open: Callable[[], OutgoingChannel]
    close: Callable[[], None]


def _ready(channel: OutgoingChannel) -> Departure:
    return Departure(lambda: channel, channel.abort)


def find_destination(address: Address, descriptors: Descriptors, interrupt: Interrupt) -> Departure:
    """Take the descriptor, create the nameless file, or note the address to connect to.

    Raises:
        SinkError: the file cannot be created, or the descriptor not positioned.
        NotFoundError: no such descriptor. UsageError: the file name cannot be used.
    """
    match address:
        case TcpAddress() | UnixAddress():
            return Departure(
                lambda: _FdChannel(_connect(address, interrupt), interrupt), lambda: None
            )
        case FdAddress(name):
            return _ready(_FdChannel(descriptors.take(name), interrupt))
        case FdsetAddress(fdset_id, offset_bytes):
            return _ready(_from_offset(descriptors, fdset_id, offset_bytes, interrupt))
        case FileAddress(path, offset_bytes):
            if offset_bytes:
                raise UsageError(
                    f"cannot write into {path} from offset {offset_bytes} on",
                    why="a migration makes a new file",
                    remedy="hand over a descriptor (add-fd) and use file:/dev/fdset/N,offset=",
                )
            return _ready(_FileChannel(path, interrupt))


def _from_offset(
    descriptors: Descriptors, fdset_id: int, offset_bytes: int, interrupt: Interrupt
) -> OutgoingChannel:
    fd = descriptors.open_fdset(fdset_id, os.O_WRONLY)
    try:
        if stat.S_ISREG(os.fstat(fd).st_mode):
            os.ftruncate(fd, offset_bytes)
            os.lseek(fd, offset_bytes, os.SEEK_SET)
        return _FdChannel(fd, interrupt)
    except OSError as error:
        os.close(fd)
        raise SinkError(
            f"cannot write to fdset {fdset_id} from offset {offset_bytes} on", why=error.strerror
        ) from error


def _connect(address: TcpAddress | UnixAddress, interrupt: Interrupt) -> int:
    what = f"Failed to connect to '{address}'"
    try:
        if isinstance(address, UnixAddress):
            with socket_name(address.path) as name:
                sock = _connected(socket.AF_UNIX, name, interrupt)
        else:
            sock = _connect_tcp(address, interrupt)
    except OSError as error:
        raise SinkError(what, why=error.strerror or str(error)) from error
    if interrupt.is_set:
        sock.close()
        raise SinkError(what, why="it was cancelled")
    return sock.detach()


def _connect_tcp(address: TcpAddress, interrupt: Interrupt) -> socket.socket:
    failure = OSError(errno.EADDRNOTAVAIL, "it has no address")
    for family, _, _, _, target in socket.getaddrinfo(
        address.host or "localhost", address.port, type=socket.SOCK_STREAM
    ):
        try:
            sock = _connected(family, target, interrupt)
        except OSError as error:
            failure = error
            continue
        sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        return sock
    raise failure


def _connected(family: int, target: object, interrupt: Interrupt) -> socket.socket:
    sock = socket.socket(family, socket.SOCK_STREAM | socket.SOCK_CLOEXEC)
    try:
        sock.setblocking(False)
        number = sock.connect_ex(target)  # type: ignore[arg-type]  # as getaddrinfo gave it
        while number == errno.EAGAIN and not interrupt.is_set:
            # The listener's queue is full, and no event says when it has room again.
            retry = select.poll()  # unlike select(), takes descriptors above 1023
            retry.register(interrupt, select.POLLIN)
            retry.poll(_RETRY_S * 1e3)
            number = sock.connect_ex(target)  # type: ignore[arg-type]
        if number == errno.EINPROGRESS:
            wait_for(sock.fileno(), select.POLLOUT, interrupt)
            number = sock.getsockopt(socket.SOL_SOCKET, socket.SO_ERROR)
        if number:
            raise OSError(number, os.strerror(number))
    except BaseException:
        sock.close()
        raise
    return sock
