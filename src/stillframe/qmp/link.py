"""The transport of whole QMP messages over one socket, with deadlines.

A guard process may share the socket's open file description, so it is never shut down.
"""

from __future__ import annotations

import os
import select
import socket
import time
from array import array
from collections.abc import Callable

from stillframe.qmp.framing import Framer

_READ_BYTES = 1 << 16

Message = dict[str, object]


class Link:
    """One connected stream socket. One thread at a time may send, and one may receive."""

    def __init__(self, sock: socket.socket) -> None:
        sock.setblocking(False)
        self.socket = sock
        self._framer = Framer()
        self._stop_fd = os.eventfd(0, os.EFD_CLOEXEC)

    def send(self, data: bytes, deadline_s: float, fds: tuple[int, ...] = ()) -> None:
        """Send all of ``data``, with the descriptors on the first byte (unix(7): SCM_RIGHTS).

        Raises:
            OSError: the connection is broken, or the deadline passed (TimeoutError).
            ValueError: the link is closed.
        """
        rights = [(socket.SOL_SOCKET, socket.SCM_RIGHTS, array("i", fds))] if fds else []
        while data:
            try:
                sent = self.socket.sendmsg([data], rights, socket.MSG_NOSIGNAL)
            except BlockingIOError:
                if not self._ready(select.POLLOUT, deadline_s):
                    raise TimeoutError from None
                continue
            data, rights = data[sent:], []

    def receive(self, deadline_s: float) -> list[Message]:
        """Return the next messages, at least one.

        Raises:
            EOFError: the peer hung up. TimeoutError, OSError.
            FramingError: the input is no QMP.
        """
        messages: list[Message] = []
        while not messages:
            if not self._ready(select.POLLIN, deadline_s):
                raise TimeoutError
            data = self.socket.recv(_READ_BYTES)
            if not data:
                raise EOFError
            messages = self._framer.feed(data)
        return messages

    def receive_until_stopped(self, take: Callable[[Message], None]) -> None:
        """Pass each message to ``take`` until the peer hangs up or ``stop`` is called.

        Raises:
            OSError, FramingError: as ``receive``.
        """
        poller = select.poll()
        poller.register(self.socket, select.POLLIN)
        poller.register(self._stop_fd, select.POLLIN)
        while all(fd != self._stop_fd for fd, _event in poller.poll()):
            try:
                data = self.socket.recv(_READ_BYTES)
            except BlockingIOError:
                continue
            if not data:
                return
            for message in self._framer.feed(data):
                take(message)

    def stop(self) -> None:
        """Make ``receive_until_stopped`` return soon."""
        os.eventfd_write(self._stop_fd, 1)

    def close(self) -> None:
        """Close the socket; no thread may be in ``receive``."""
        self.socket.close()
        os.close(self._stop_fd)

    def _ready(self, event: int, deadline_s: float) -> bool:
        poller = select.poll()
        poller.register(self.socket, event)
        return bool(poller.poll(max(0.0, deadline_s - time.monotonic()) * 1e3))
