"""Access to a snapshot's frames by number, with cache and read-ahead; of one file, or of a
chain."""

from __future__ import annotations

import os
from abc import ABC, abstractmethod
from collections import OrderedDict, deque
from collections.abc import Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from threading import Lock
from typing import Final, Self

from stillframe.errors import DataError
from stillframe.model import Manifest
from stillframe.still.index import Index
from stillframe.still.sinks import Source

CACHE_BYTES: Final = 32 << 20
_READ_AHEAD = 4


class FrameReader(ABC):
    """Reader of an open snapshot. Safe to share between threads.

    ``index``: of the readable frames. ``source``: the file that is read; of a chain, the newest.
    ``place``: where the snapshot is: that file, unless it is a whole form. ``id``: the snapshot's
    id. ``content_id``: id of the frames that are read.
    """

    source: Source
    place: str
    id: str
    content_id: str
    manifest: Manifest
    index: Index

    def __init__(self) -> None:
        self._cache: OrderedDict[int, bytes] = OrderedDict()
        self._cached_bytes = 0
        self._cache_limit_bytes = CACHE_BYTES
        self._lock = Lock()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_error: object) -> None:
        self.close()

    @property
    @abstractmethod
    def may_lack_pages(self) -> bool:
        """Whether pages may be in no frame, as in an imported stream; such pages are zero."""

    @abstractmethod
    def close(self) -> None:
        """Close the file, or files."""

    @abstractmethod
    def was_taken_here(self) -> bool:
        """Return whether the mark says that this user took it on this host."""

    @abstractmethod
    def read_frame(self, number: int) -> bytes:
        """Return a decompressed frame, after verifying digest and content checksum.

        Raises:
            DataError: damaged.
        """

    @abstractmethod
    def read_stored(self, number: int) -> bytes:
        """Return a compressed frame, after verifying its digest.

        Raises:
            DataError: damaged.
        """

    @abstractmethod
    def check_rest(self) -> None:
        """Check those parts of the file, or files, that no frame of the index covers.

        Raises:
            DataError: damaged.
        """

    @abstractmethod
    def at_frame(self, number: int, error: DataError) -> DataError:
        """Return the error with the file, the frame's number and its offset added."""

    def cached_frame(self, number: int) -> bytes:
        """Return a frame as :meth:`read_frame` does, from an LRU cache of ``CACHE_BYTES``."""
        with self._lock:
            raw = self._cache.get(number)
            if raw is not None:
                self._cache.move_to_end(number)
                return raw
        raw = self.read_frame(number)
        with self._lock:
            if number not in self._cache:
                self._cache[number] = raw
                self._cached_bytes += len(raw)
            while self._cached_bytes > self._cache_limit_bytes and len(self._cache) > 1:
                self._cached_bytes -= len(self._cache.popitem(last=False)[1])
        return raw

    def grow_cache(self, limit_bytes: int) -> None:
        """Enlarge the frame cache, for non-sequential readers."""
        with self._lock:
            self._cache_limit_bytes = max(self._cache_limit_bytes, limit_bytes)

    def iter_frames(self, numbers: Iterable[int]) -> Iterator[tuple[int, bytes]]:
        """Yield (number, decompressed frame) in the given order; worker threads read ahead.

        Raises:
            DataError: damaged.
        """
        workers = min(_READ_AHEAD, os.cpu_count() or 1)
        pending: deque[tuple[int, Future[bytes]]] = deque()
        with ThreadPoolExecutor(workers, thread_name_prefix="still-read") as pool:
            try:
                for number in numbers:
                    pending.append((number, pool.submit(self.read_frame, number)))
                    if len(pending) > workers:
                        ready, future = pending.popleft()
                        yield ready, future.result()
                while pending:
                    ready, future = pending.popleft()
                    yield ready, future.result()
            finally:
                for _, future in pending:
                    future.cancel()
