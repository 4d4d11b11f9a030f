"""A sink: an object in a bucket, uploaded in parts while a snapshot is taken."""

from __future__ import annotations

import queue
import threading
from collections.abc import Iterator
from contextlib import suppress
from typing import Any, Final

from stillframe.errors import SinkError, StillframeError, UsageError
from stillframe.still.frames import BytesLike
from stillframe.store.backends.bucket_errors import translated

_PART_BYTES: Final = 16 << 20
"""S3 takes at most 10,000 parts: 156 GiB of a snapshot's compressed data."""
_UPLOADS_AT_ONCE: Final = 4
_TICK_S: Final = 0.1


class _GivenUp(Exception):  # noqa: N818 - no error
    """Raised into obstore to end the upload; the object store then discards its parts."""


class BucketSink:
    """Upload of one object. See ``still.sinks.Sink``. Holds at most six parts in memory.

    Args:
        store: obstore's store.
        key: the object's key.
        name: the object's name in messages.
    """

    def __init__(self, store: Any, key: str, name: str) -> None:
        self._store, self._key, self._name = store, key, name
        self._state = "open"
        self._part = bytearray()
        self._parts: queue.Queue[bytes | None] = queue.Queue(maxsize=1)
        self._error: StillframeError | None = None
        self._given_up = False
        self._uploads: threading.Thread | None = None

    @property
    def description(self) -> str:
        return self._name

    def write(self, data: BytesLike) -> None:
        """Append ``data``; it is uploaded in the background.

        Raises:
            SinkError: not permitted, not reachable for longer than the retries last.
        """
        self._check_open()
        rest = memoryview(data).cast("B")
        while rest:
            room = _PART_BYTES - len(self._part)
            self._part += rest[:room]
            rest = rest[room:]
            if len(self._part) == _PART_BYTES:
                self._hand_over(bytes(self._part))
                self._part.clear()

    def commit(self) -> None:
        """Upload the rest; the object gets its name once the object store confirms it.

        Raises:
            SinkError: the upload failed, or an object of that name exists. Nothing is left behind.
        """
        self._check_open()
        try:
            self._check_free()
            self._hand_over(bytes(self._part))
            self._hand_over(None)
            assert self._uploads is not None
            self._uploads.join()
            if self._error is not None:
                raise self._error
        except BaseException:
            self.abort()
            raise
        self._state = "committed"

    def abort(self) -> None:
        """End the upload; the object store discards its parts."""
        if self._state != "open":
            return
        self._state = "aborted"
        self._given_up = True
        if self._uploads is not None:
            self._uploads.join()
        self._part.clear()

    def _check_open(self) -> None:
        if self._state != "open":
            raise UsageError(f"{self._name} is already {self._state}")

    def _check_free(self) -> None:
        """Check that the name is free: multipart uploads replace an object and are not conditional
        everywhere. Large objects have random or content-derived names, so this is enough."""
        import obstore

        with translated("write", self._name, writing=True):
            try:
                obstore.head(self._store, self._key)
            except FileNotFoundError:
                return
        raise SinkError(f"{self._name} already exists")

    def _hand_over(self, part: bytes | None) -> None:
        if self._uploads is None:
            self._uploads = threading.Thread(target=self._upload, name="upload", daemon=True)
            self._uploads.start()
        while True:
            if self._error is not None:
                raise self._error
            with suppress(queue.Full):
                self._parts.put(part, timeout=_TICK_S)
                return

    def _upload(self) -> None:
        import obstore

        try:
            with translated("write", self._name, writing=True):
                obstore.put(
                    self._store,
                    self._key,
                    self._chunks(),
                    chunk_size=_PART_BYTES,
                    max_concurrency=_UPLOADS_AT_ONCE,
                )
        except _GivenUp:
            pass
        except StillframeError as error:
            self._error = error
        except Exception as error:  # noqa: BLE001 - raised in the writing thread
            self._error = SinkError(f"cannot write {self._name}", why=str(error))

    def _chunks(self) -> Iterator[bytes]:
        while True:
            if self._given_up:
                raise _GivenUp
            try:
                part = self._parts.get(timeout=_TICK_S)
            except queue.Empty:
                continue
            if part is None:
                return
            if part:
                yield part
