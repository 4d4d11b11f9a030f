"""Destinations that never answer, such as a program that only stores: whether they read at all.

A destination that would start the guest must not pass for one of these: the source sends the
stream's end only when everything before it was read, as far as the kernel can tell.
"""

from __future__ import annotations

import fcntl
import socket
import struct
import termios
import time
from collections.abc import Callable

from stillframe.board.migration.interruptible import Interrupt, InterruptibleFd
from stillframe.board.migration.source_link import SourceLink
from stillframe.errors import SinkError

PATIENCE_S = 5.0
"""How long a destination may go without reading."""
_STEP_S = 0.01
_INT = struct.Struct("=i")


class Peer:
    """The other end of a socket."""

    def __init__(self, fd: InterruptibleFd, interrupt: Interrupt) -> None:
        self._fd = fd
        self.interrupt = interrupt
        with socket.socket(fileno=socket.dup(fd.fileno())) as sock:
            self.shows_reads = sock.family == socket.AF_UNIX
            """Whether ``unread_bytes`` means bytes not read, rather than bytes not acknowledged."""

    @property
    def unread_bytes(self) -> int:
        """The bytes that a local reader has not read (by the kernel's count, which is higher), or
        that a remote kernel has not acknowledged; 0 if unknown.

        Source: ``unix(7)``, ``tcp(7)``: SIOCOUTQ.
        """
        try:
            answer = fcntl.ioctl(self._fd.fileno(), termios.TIOCOUTQ, bytes(_INT.size))
        except OSError:
            return 0
        return int(_INT.unpack(answer)[0])

    @property
    def was_reset(self) -> bool:
        """Whether the peer closed before it had read everything."""
        return self._fd.was_reset

    def end(self) -> None:
        """Shut down the socket for writing.

        Raises:
            SinkError: the peer is gone.
        """
        try:
            with socket.socket(fileno=socket.dup(self._fd.fileno())) as sock:
                sock.shutdown(socket.SHUT_WR)
        except OSError as error:
            raise SinkError("Unable to write to socket", why=error.strerror) from error


class _Patience:
    """A time limit on the peer's inactivity."""

    def __init__(self, peer: Peer) -> None:
        self._peer = peer
        self._left_bytes = peer.unread_bytes
        self._since_s = time.monotonic()

    def check(self) -> None:
        left_bytes, now = self._peer.unread_bytes, time.monotonic()
        if left_bytes < self._left_bytes:
            self._since_s = now
        self._left_bytes = left_bytes
        if now - self._since_s > PATIENCE_S:
            raise SinkError(
                "the destination neither answers nor reads what is sent",
                why=f"nothing was read for {PATIENCE_S:g} s",
            )


def wait_taken(peer: Peer, link: SourceLink, check: Callable[[], None]) -> None:
    """Wait until the destination has taken everything sent so far, or answers.

    Args:
        check: raises to end the wait, such as after a cancel.

    Raises:
        SinkError, DataError: the destination takes nothing, hung up, or sends malformed messages.
    """
    patience = _Patience(peer)
    while peer.unread_bytes and not link.answered:
        link.wait_answer(_STEP_S)
        check()
        patience.check()


def wait_stored(peer: Peer, link: SourceLink) -> None:
    """Wait, after the stream's end, until the destination has read it, or answers after all.

    A local destination has read it when the socket's queue is empty; any destination, when it
    closes its end after ours.

    Raises:
        SinkError, DataError: it was not read, or that cannot be known.
    """
    peer.end()
    patience = _Patience(peer)
    while not link.answered:
        hung_up = link.wait_hung_up(_STEP_S)
        if peer.interrupt.is_set:
            raise SinkError("nobody waits for the destination any more")
        if hung_up and peer.was_reset:
            raise SinkError("the destination hung up before it had read everything")
        if hung_up or (peer.shows_reads and not peer.unread_bytes):
            return
        patience.check()
