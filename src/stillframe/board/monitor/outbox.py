"""Messages to one QMP client: sent at once if possible, else queued."""

from __future__ import annotations

import socket
import threading
from collections import deque

_CONGESTED_BYTES = 64 << 10
_EVENTS_MAX_BYTES = 4 << 20


class Outbox:
    """The queue of messages to one client. Callable from any thread; never blocks.

    Args:
        sock: the client's socket, non-blocking; the caller still owns it.
    """

    def __init__(self, sock: socket.socket) -> None:
        self._socket = sock
        self._lock = threading.Lock()
        self._kept: deque[memoryview] = deque()
        self._kept_bytes = 0
        self._dead = False

    @property
    def dead(self) -> bool:
        """Whether the client is gone, or was dropped for not reading its events."""
        return self._dead

    @property
    def pending(self) -> bool:
        """Whether messages are queued for ``flush``."""
        return bool(self._kept)

    @property
    def congested(self) -> bool:
        """Whether the queue is too long to read more commands from this client."""
        return self._kept_bytes > _CONGESTED_BYTES

    def put(self, message: bytes) -> None:
        """Send a message, or queue it."""
        with self._lock:
            if not self._dead:
                self._kept.append(memoryview(message))
                self._kept_bytes += len(message)
                self._send()

    def put_event(self, message: bytes) -> None:
        """Like ``put``, but drop a client that leaves too many bytes unread.

        A client controls how many replies it gets, but not how many events.
        """
        if self._kept_bytes > _EVENTS_MAX_BYTES:
            self.give_up()
        else:
            self.put(message)

    def flush(self) -> None:
        """Send as much of the queue as the socket takes."""
        with self._lock:
            if not self._dead:
                self._send()

    def give_up(self) -> None:
        """Discard the queue and accept nothing more; never raises."""
        with self._lock:
            self._end()

    def _send(self) -> None:
        while self._kept:
            try:
                sent = self._socket.send(self._kept[0], socket.MSG_NOSIGNAL | socket.MSG_DONTWAIT)
            except (BlockingIOError, InterruptedError):
                return
            except OSError:
                self._end()
                return
            self._kept_bytes -= sent
            self._kept[0] = self._kept[0][sent:]
            if not self._kept[0]:
                self._kept.popleft()

    def _end(self) -> None:
        self._dead = True
        self._kept.clear()
        self._kept_bytes = 0
