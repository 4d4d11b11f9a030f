"""Between the code that writes sections, a few bytes at a time, and the channel."""

from __future__ import annotations

from stillframe.migration.counters import Counters
from stillframe.migration.outgoing_channel import OutgoingChannel
from stillframe.store.frames import BytesLike

_GATHER_BYTES = 64 << 10


class Buffer:
    """Keeps what is written to it."""

    def __init__(self) -> None:
        self._parts: list[bytes] = []

    def write(self, data: BytesLike, /) -> None:
        self._parts.append(bytes(data))

    @property
    def content(self) -> bytes:
        return b"".join(self._parts)


class GatheredOutput:
    """Gathers small writes, and counts all."""

    def __init__(self, channel: OutgoingChannel, counters: Counters) -> None:
        self._channel = channel
        self._counters = counters
        self._small: list[bytes] = []
        self._small_bytes = 0

    def write(self, data: BytesLike, /) -> None:
        """Take ``data``; it may go out only at ``flush``.

        Raises:
            SinkError: the destination failed.
        """
        length_bytes = memoryview(data).nbytes
        if length_bytes >= _GATHER_BYTES:
            self.flush()
            self._send(data)
            return
        self._small.append(bytes(data))
        self._small_bytes += length_bytes
        if self._small_bytes >= _GATHER_BYTES:
            self.flush()

    def flush(self) -> None:
        """Let everything go out that was written so far.

        Raises:
            SinkError: the destination failed.
        """
        if self._small:
            gathered = b"".join(self._small)
            self._small, self._small_bytes = [], 0
            self._send(gathered)

    def _send(self, data: BytesLike) -> None:
        self._channel.write(data)
        self._counters.took(memoryview(data).nbytes)
