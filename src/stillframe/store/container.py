"""Opens a snapshot file: finds index and manifest from its end, reads frames, checks digests."""

from __future__ import annotations

import os
from collections import OrderedDict, deque
from collections.abc import Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from threading import Lock
from typing import Final

import msgspec

from stillframe.errors import DataError
from stillframe.model import Manifest
from stillframe.store.backends import Source
from stillframe.store.frames import SKIPPABLE_HEADER, decompress_frame, digest_of
from stillframe.store.index import Index
from stillframe.store.index_codec import decode_index
from stillframe.store.trailer import (
    INDEX_FRAME_MAGIC,
    MANIFEST_FRAME_MAGIC,
    SEEK_FOOTER,
    TRAILER_FRAME_BYTES,
    Trailer,
    decode_trailer,
    seek_table_bytes,
    seek_table_matches,
)
from stillframe.vmstate.wire import STREAM_MAGIC

MANIFEST_MAX_BYTES: Final = 64 << 20
INDEX_MAX_BYTES: Final = 1 << 30
CACHE_BYTES: Final = 32 << 20
_READ_AHEAD = 4


class Container:
    """The frames, index and manifest of an open snapshot file. Safe to share between threads.

    Nothing in the file is believed before it was checked: lengths against the file's size,
    contents against their digests. (Digests protect against damage. Whoever can write the file
    can also write matching digests; compare :attr:`id` with a known one against that.)

    Args:
        source: the file; owned from here on, also if this raises.

    Raises:
        DataError: not a snapshot file, damaged, or of a version that we do not know.
    """

    def __init__(self, source: Source) -> None:
        self.source = source
        self._cache: OrderedDict[int, bytes] = OrderedDict()
        self._cached_bytes = 0
        self._cache_limit_bytes = CACHE_BYTES
        self._lock = Lock()
        try:
            try:
                trailer = self._read_trailer()
            except DataError as error:
                if not self._is_stream():
                    raise
                raise DataError(
                    f"{source.description} is a migration stream, no snapshot file",
                    remedy="make one of it with 'stillframe import'",
                ) from error
            self.id = trailer.snapshot_id
            self.manifest = self._read_manifest(trailer)
            self.index = self._read_index(trailer)
        except BaseException:
            source.close()
            raise

    def _read_trailer(self) -> Trailer:
        size = self.source.size_bytes
        footer_offset = max(0, size - SEEK_FOOTER.size)
        footer = self.source.read_at(footer_offset, size - footer_offset)
        self._seek_table_offset = size - seek_table_bytes(footer, size)
        offset = self._seek_table_offset - TRAILER_FRAME_BYTES
        return decode_trailer(self.source.read_at(offset, TRAILER_FRAME_BYTES), offset)

    def _is_stream(self) -> bool:
        magic = STREAM_MAGIC.to_bytes(4, "big")
        return self.source.size_bytes >= len(magic) and self.source.read_at(0, 4) == magic

    def _read_own(self, name: str, magic: int, offset: int, length: int, digest: bytes) -> bytes:
        header = self.source.read_at(offset - SKIPPABLE_HEADER.size, SKIPPABLE_HEADER.size)
        content = self.source.read_at(offset, length)
        if header != SKIPPABLE_HEADER.pack(magic, length) or digest_of(content) != digest:
            raise DataError(f"the {name} is damaged", offset_bytes=offset)
        return content

    def _read_manifest(self, trailer: Trailer) -> Manifest:
        if trailer.manifest_bytes > MANIFEST_MAX_BYTES:
            raise DataError(f"the manifest has {trailer.manifest_bytes} bytes")
        content = self._read_own(
            "manifest",
            MANIFEST_FRAME_MAGIC,
            trailer.manifest_offset,
            trailer.manifest_bytes,
            trailer.manifest_digest,
        )
        return decode_manifest(content)

    def _read_index(self, trailer: Trailer) -> Index:
        if trailer.index_bytes > INDEX_MAX_BYTES:
            raise DataError(f"the index has {trailer.index_bytes} bytes")
        content = self._read_own(
            "index",
            INDEX_FRAME_MAGIC,
            trailer.index_offset,
            trailer.index_bytes,
            trailer.index_digest,
        )
        index = decode_index(content)
        if index.stored_bytes != trailer.index_offset - SKIPPABLE_HEADER.size:
            raise DataError("the index does not cover the file's frames")
        manifest = self.manifest
        if (
            index.target_page_bytes != manifest.target_page_bytes
            or index.stream_bytes != manifest.stream_bytes
            or [(b.idstr, b.used_length_bytes) for b in index.blocks]
            != [(b.idstr, b.used_length_bytes) for b in manifest.blocks]
        ):
            raise DataError("the index does not agree with the manifest")
        self._own_sizes = (
            SKIPPABLE_HEADER.size + trailer.index_bytes,
            SKIPPABLE_HEADER.size + trailer.manifest_bytes,
            TRAILER_FRAME_BYTES,
        )
        return index

    def close(self) -> None:
        """Close the file."""
        self.source.close()

    def check_seek_table(self) -> None:
        """Check the seek table, which we do not need ourselves, against the index.

        Raises:
            DataError: it does not list the file's frames.
        """
        offset = self._seek_table_offset
        frame = self.source.read_at(offset, self.source.size_bytes - offset)
        own = ((size, 0) for size in self._own_sizes)
        if not seek_table_matches(frame, [*self.index.frame_sizes(), *own]):
            raise DataError("the seek table does not list the file's frames", offset_bytes=offset)

    def read_stored(self, number: int) -> bytes:
        """A frame as it is in the file, its digest checked.

        Raises:
            DataError: damaged.
        """
        entry = self.index.frame(number)
        stored = self.source.read_at(entry.offset_bytes, entry.stored_bytes)
        if digest_of(stored) != entry.digest:
            raise DataError(
                f"frame {number} of {self.source.description} is damaged",
                why="its digest is not the one in the index",
                offset_bytes=entry.offset_bytes,
            )
        return stored

    def read_frame(self, number: int) -> bytes:
        """A frame decompressed, digest and content checksum checked.

        Raises:
            DataError: damaged.
        """
        entry = self.index.frame(number)
        stored = self.read_stored(number)
        try:
            return decompress_frame(stored, entry.raw_bytes)
        except DataError as error:
            raise self.at_frame(number, error) from error

    def at_frame(self, number: int, error: DataError) -> DataError:
        """The same error, with the frame's number and place."""
        return DataError(
            f"frame {number} of {self.source.description}: {error.what}",
            why=error.why,
            offset_bytes=self.index.frame(number).offset_bytes,
        )

    def cached_frame(self, number: int) -> bytes:
        """As :meth:`read_frame`, with the last ones used kept (``CACHE_BYTES``)."""
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
        """Let :meth:`cached_frame` keep more, for readers that go back and forth."""
        with self._lock:
            self._cache_limit_bytes = max(self._cache_limit_bytes, limit_bytes)

    def iter_frames(self, numbers: Iterable[int]) -> Iterator[tuple[int, bytes]]:
        """Frames decompressed in the given order, a few of them ahead on other threads.

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


def decode_manifest(content: bytes) -> Manifest:
    """Decode a manifest's JSON.

    Raises:
        DataError: malformed, or of a format that we do not know.
    """
    try:
        manifest = msgspec.json.decode(content, type=Manifest)
    except (msgspec.MsgspecError, UnicodeDecodeError, RecursionError) as error:
        raise DataError("the manifest is malformed", why=str(error)) from error
    if manifest.format != 1:
        raise DataError(
            f"the manifest has format {manifest.format}, only 1 is known",
            remedy="read it with a newer Stillframe",
        )
    return manifest
