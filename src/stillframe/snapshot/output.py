"""Where a job's stream goes: into a snapshot file (``still.writer``), or on as it is."""

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
    """Takes the stream in pieces: the head, whole PART sections of RAM in any order, the tail."""

    @property
    def description(self) -> str:
        """What people call it, such as its path."""

    @property
    def stream_bytes(self) -> int:
        """Length of the stream so far."""

    @property
    def file_bytes(self) -> int:
        """Bytes that the sink has taken so far."""

    def encode(self, raw: BytesLike, level: int | None = None) -> EncodedFrame:
        """Make a piece ready. Thread-safe, without side effects."""

    def append(self, frame: EncodedFrame, runs: Sequence[PageRun] | BytesLike = b"") -> object:
        """Write a piece with pages in it; several threads take turns. Raises SinkError."""

    def append_stream(self, raw: BytesLike) -> None:
        """Write a piece without pages. Raises SinkError."""

    def finish(self, manifest: Manifest, *, key: HostKey | None = None) -> str:
        """All was written: make it durable. Returns the snapshot's id, empty if it has none.

        Args:
            key: marks the snapshot as taken on this host.
        """

    def abort(self) -> None:
        """Give up: nothing stays behind. Does nothing after :meth:`finish`."""


class StreamOutput:
    """The plain stream, as QEMU writes it: an ``Output``."""

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
    """Nothing is kept but what an early reader has: an ``Output``."""

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
