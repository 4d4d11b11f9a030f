"""A source: an object in a bucket, read by ranges."""

from __future__ import annotations

import threading
from collections import deque
from typing import Any, Final

from stillframe.errors import DataError, HostError, NotFoundError, UnreadableError
from stillframe.store.backends.bucket_errors import translated

_AHEAD_BYTES: Final = 8 << 20
_GAP_BYTES: Final = 1 << 20
"""Two threads that share one sequential pass through a file leave gaps of up to this size."""


class BucketSource:
    """One object, read by ranges from any number of threads. See ``still.sinks.Source``.

    Args:
        store: obstore's store.
        key: the object's key.
        name: the object's name in messages.

    Raises:
        NotFoundError: there is no such object. HostError: not permitted, or not reachable.
    """

    def __init__(self, store: Any, key: str, name: str) -> None:
        import obstore

        self._obstore: Any = obstore
        self._store, self._key, self._name = store, key, name
        with translated("read", name):
            meta = obstore.head(store, key)
        self._size_bytes = int(meta["size"])
        self._lock = threading.Lock()
        self._ends: deque[int] = deque(maxlen=8)
        self._ahead: deque[tuple[int, bytes]] = deque(maxlen=4)

    @property
    def description(self) -> str:
        return self._name

    @property
    def size_bytes(self) -> int:
        return self._size_bytes

    @property
    def owner_uid(self) -> int | None:
        return None

    @property
    def others_may_write(self) -> bool:
        return False

    def read_at(self, offset_bytes: int, length_bytes: int) -> bytes:
        """Return exactly ``length_bytes`` bytes.

        Raises:
            DataError: the object is shorter, or gone. UnreadableError: it cannot be reached.
        """
        end = offset_bytes + length_bytes
        if offset_bytes < 0 or length_bytes < 0:
            raise DataError(f"{length_bytes} bytes at {offset_bytes} cannot be read")
        if end > self._size_bytes:
            raise DataError(
                f"{self._name} is truncated",
                why=f"{end - max(self._size_bytes, offset_bytes)} bytes are missing",
                offset_bytes=self._size_bytes,
            )
        if not length_bytes:
            return b""
        found = self._kept(offset_bytes, end)
        if found is not None:
            return found
        wanted_bytes = length_bytes
        if self._goes_on(offset_bytes):
            wanted_bytes = min(max(length_bytes, _AHEAD_BYTES), self._size_bytes - offset_bytes)
        data = self._get(offset_bytes, wanted_bytes)
        with self._lock:
            self._ends.append(end)
            if wanted_bytes > length_bytes:
                self._ahead.append((offset_bytes, data))
        return data[:length_bytes]

    def _kept(self, offset_bytes: int, end: int) -> bytes | None:
        """Return the range if it was read ahead, else None."""
        with self._lock:
            for start, data in self._ahead:
                if start <= offset_bytes and end <= start + len(data):
                    self._ends.append(end)
                    return data[offset_bytes - start : end - start]
        return None

    def _goes_on(self, offset_bytes: int) -> bool:
        """Return whether the range continues a sequential read; a fault fetches only its own
        frame."""
        with self._lock:
            return any(0 <= offset_bytes - last <= _GAP_BYTES for last in self._ends)

    def _get(self, offset_bytes: int, length_bytes: int) -> bytes:
        try:
            with translated("read", self._name):
                data = self._obstore.get_range(
                    self._store, self._key, start=offset_bytes, length=length_bytes
                )
        except NotFoundError as error:
            raise DataError(str(error), offset_bytes=offset_bytes) from error
        except HostError as error:
            raise UnreadableError(
                error.what, why=error.why, remedy=error.remedy, offset_bytes=offset_bytes
            ) from error
        if len(data) != length_bytes:
            raise DataError(
                f"{self._name} is truncated",
                why=f"{length_bytes - len(data)} bytes are missing",
                offset_bytes=offset_bytes + len(data),
            )
        return bytes(data)

    def close(self) -> None:
        """Drop the read-ahead buffers."""
        with self._lock:
            self._ahead.clear()
