"""What a QMP server has to say to one client: said at once if it listens, else kept for a while."""

from __future__ import annotations

import socket
import threading
from collections import deque

_CONGESTED_BYTES = 64 << 10
_EVENTS_MAX_BYTES = 4 << 20


class Outbox:
    """Messages to one client, in order. Callable from any thread; nobody ever waits.

    Args:
        sock: the client's socket, not blocking. It stays the caller's to close.
    """

    def __init__(self, sock: socket.socket) -> None:
        self._socket = sock
        self._lock = threading.Lock()
        self._kept: deque[memoryview] = deque()
        self._kept_bytes = 0
        self._dead = False

    @property
    def dead(self) -> bool:
        """Whether the client is gone, or has been given up since it does not read its events."""
        return self._dead

    @property
    def pending(self) -> bool:
        """Whether ``flush`` has something to do once the socket takes more."""
        return bool(self._kept)

    @property
    def congested(self) -> bool:
        """Whether so much is kept that no more commands should be taken from this client."""
        return self._kept_bytes > _CONGESTED_BYTES

    def put(self, message: bytes) -> None:
        """Say something."""
        with self._lock:
            if not self._dead:
                self._kept.append(memoryview(message))
                self._kept_bytes += len(message)
                self._send()

    def put_event(self, message: bytes) -> None:
        """As ``put``, but the client is given up if it has left too many unread.

        It decides itself how many answers there are, but not how many events.
        """
        if self._kept_bytes > _EVENTS_MAX_BYTES:
            self.give_up()
        else:
            self.put(message)

    def flush(self) -> None:
        """Send what is kept, as much as goes."""
        with self._lock:
            if not self._dead:
                self._send()

    def give_up(self) -> None:
        """Forget what is kept, and take nothing more; never raises."""
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
