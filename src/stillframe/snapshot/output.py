"""The outputs of a job's stream: a snapshot file (``still.writer``), or the plain stream."""

from __future__ import annotations

from collections.abc import Sequence
from threading import Lock
from typing import Protocol

from stillframe.model import Manifest
from stillframe.still.frames import BytesLike, EncodedFrame
from stillframe.still.host_mark import HostKey
from stillframe.still.index import PageRun
from stillframe.still.sinks import Sink


class Output(Protocol):
    """An output, which takes the stream in pieces: the head, whole PART sections of RAM in any
    order, the tail."""

    @property
    def description(self) -> str:
        """The name to show to users, such as a path."""

    @property
    def stream_bytes(self) -> int:
        """Length of the stream so far."""

    @property
    def file_bytes(self) -> int:
        """Bytes written to the sink so far."""

    def encode(self, raw: BytesLike, level: int | None = None) -> EncodedFrame:
        """Encode a piece. Thread-safe, without side effects."""

    def append(self, frame: EncodedFrame, runs: Sequence[PageRun] | BytesLike = b"") -> object:
        """Write a piece that contains pages. Thread-safe. Raises SinkError."""

    def append_stream(self, raw: BytesLike) -> None:
        """Write a piece without pages. Raises SinkError."""

    def finish(self, manifest: Manifest, *, key: HostKey | None = None) -> str:
        """Make the complete output durable; return the snapshot's id, empty if it has none.

        Args:
            key: marks the snapshot as taken on this host.
        """

    def abort(self) -> None:
        """Give up, and leave nothing behind. Does nothing after :meth:`finish`."""


class StreamOutput:
    """An ``Output`` of the plain stream, as QEMU writes it."""

    def __init__(self, sink: Sink) -> None:
        self._sink = sink
        self._lock = Lock()
        self._bytes = 0

    @property
    def description(self) -> str:
        return self._sink.description

    @property
    def stream_bytes(self) -> int:
        return self._bytes

    @property
    def file_bytes(self) -> int:
        return self._bytes

    def encode(self, raw: BytesLike, level: int | None = None) -> EncodedFrame:
        return EncodedFrame(data=raw, raw_bytes=memoryview(raw).nbytes, digest=b"")

    def append(self, frame: EncodedFrame, runs: Sequence[PageRun] | BytesLike = b"") -> None:
        with self._lock:
            self._sink.write(frame.data)
            self._bytes += frame.raw_bytes

    def append_stream(self, raw: BytesLike) -> None:
        self.append(self.encode(raw))

    def finish(self, manifest: Manifest, *, key: HostKey | None = None) -> str:
        self._sink.commit()
        return ""

    def abort(self) -> None:
        self._sink.abort()


class NoOutput:
    """An ``Output`` that keeps nothing; only an early reader gets the pages."""

    description = "the clones' image"
    stream_bytes = file_bytes = 0

    def encode(self, raw: BytesLike, level: int | None = None) -> EncodedFrame:
        return EncodedFrame(data=b"", raw_bytes=memoryview(raw).nbytes, digest=b"")

    def append(self, frame: EncodedFrame, runs: Sequence[PageRun] | BytesLike = b"") -> None:
        """Nothing to do."""

    def append_stream(self, raw: BytesLike) -> None:
        """Nothing to do."""

    def finish(self, manifest: Manifest, *, key: HostKey | None = None) -> str:
        return ""

    def abort(self) -> None:
        """Nothing to do."""
