"""A destination that never answers, such as a program that only stores: whether it reads at all.

Nobody who starts a guest may take this way unseen: the stream's end is sent only when what came
before it was read, as far as the kernel can say.
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
"""For how long a destination may read nothing."""
_STEP_S = 0.01
_INT = struct.Struct("=i")


class Peer:
    """Who is at the other end of a socket."""

    def __init__(self, fd: InterruptibleFd, interrupt: Interrupt) -> None:
        self._fd = fd
        self.interrupt = interrupt
        with socket.socket(fileno=socket.dup(fd.fileno())) as sock:
            self.shows_reads = sock.family == socket.AF_UNIX
            """Whether ``unread_bytes`` counts what was not read, rather than what has not come."""

    @property
    def unread_bytes(self) -> int:
        """What a local reader has not read yet (more than its bytes: the kernel's count), or a
        distant kernel has not acknowledged; 0 where that cannot be said. Source: ``unix(7)``,
        ``tcp(7)``: SIOCOUTQ."""
        try:
            answer = fcntl.ioctl(self._fd.fileno(), termios.TIOCOUTQ, bytes(_INT.size))
        except OSError:
            return 0
        return int(_INT.unpack(answer)[0])

    @property
    def was_reset(self) -> bool:
        """Whether it closed before it had read everything."""
        return self._fd.was_reset

    def end(self) -> None:
        """Nothing more will be written.

        Raises:
            SinkError: it is gone.
        """
        try:
            with socket.socket(fileno=socket.dup(self._fd.fileno())) as sock:
                sock.shutdown(socket.SHUT_WR)
        except OSError as error:
            raise SinkError("Unable to write to socket", why=error.strerror) from error


class _Patience:
    """Ends when nothing was read for long."""

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
    """Until a destination has taken all that was sent so far, or answers.

    Args:
        check: raises if there is no point in waiting any more.

    Raises:
        SinkError, DataError: it takes nothing, hung up, or speaks nonsense.
    """
    patience = _Patience(peer)
    while peer.unread_bytes and not link.answered:
        link.wait_answer(_STEP_S)
        check()
        patience.check()


def wait_stored(peer: Peer, link: SourceLink) -> None:
    """After the stream's end: until it was read, or the destination answers after all.

    It was read when a local reader has read it, or when any has closed its end after ours.

    Raises:
        SinkError, DataError: it was not, or nobody can say.
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
