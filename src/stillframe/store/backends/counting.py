"""A sink wrapper that reports the bytes written."""

from __future__ import annotations

from collections.abc import Callable

from stillframe.still.frames import BytesLike
from stillframe.still.sinks import Sink, SparseSink


def counting(sink: Sink, progress: Callable[[int], None]) -> Sink:
    """Wrap a sink (sparse stays sparse); ``progress`` gets the bytes written so far."""
    if isinstance(sink, SparseSink):
        return _CountingSparseSink(sink, progress)
    return _CountingSink(sink, progress)


class _CountingSink:
    def __init__(self, sink: Sink, progress: Callable[[int], None]) -> None:
        self._sink = sink
        self._progress = progress
        self._taken_bytes = 0

    @property
    def description(self) -> str:
        return self._sink.description

    def write(self, data: BytesLike) -> None:
        self._sink.write(data)
        self._count(data)

    def _count(self, data: BytesLike) -> None:
        self._taken_bytes += memoryview(data).nbytes
        self._progress(self._taken_bytes)

    def commit(self) -> None:
        self._sink.commit()

    def abort(self) -> None:
        self._sink.abort()


class _CountingSparseSink(_CountingSink):
    def __init__(self, sink: SparseSink, progress: Callable[[int], None]) -> None:
        super().__init__(sink, progress)
        self._sparse = sink

    def write_at(self, offset_bytes: int, data: BytesLike) -> None:
        self._sparse.write_at(offset_bytes, data)
        self._count(data)

    def set_length(self, length_bytes: int) -> None:
        self._sparse.set_length(length_bytes)
