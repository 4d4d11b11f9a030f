"""The writer of a snapshot file: payload frames, then index, manifest, trailer, seek table."""

from __future__ import annotations

from collections.abc import Sequence
from threading import Lock
from typing import Final, Self

import msgspec

from stillframe.errors import InternalError, UsageError
from stillframe.model import Manifest
from stillframe.still.container import FORMAT, INCREMENT_FORMAT
from stillframe.still.frames import (
    FRAME_RAW_TARGET_BYTES,
    LEVEL_DEFAULT,
    BytesLike,
    EncodedFrame,
    check_level,
    compress_frame,
    digest_of,
    skippable_frame,
)
from stillframe.still.host_mark import NO_MARK, HostKey
from stillframe.still.index import Index, PageRun
from stillframe.still.index_builder import IndexBuilder, pack_runs
from stillframe.still.index_codec import encode_index
from stillframe.still.sealing import KIND_INDEX, KIND_MANIFEST, DataKey, Seal, encode_seal
from stillframe.still.sinks import Sink
from stillframe.still.trailer import (
    INDEX_FRAME_MAGIC,
    MANIFEST_FRAME_MAGIC,
    encode_seek_table,
    encode_trailer,
    trailer_of,
)

INCREMENT_PREAMBLE: Final = b"Stillframe increment: not a whole stream, its parent has the rest\n"
"""Frame 0 of an increment: what zstd unpacks is thus nothing that a VMM would load."""


class SnapshotWriter:
    """Writer of the stream, frame by frame; the decompressed frames in order are the stream.

    The first frames hold everything up to RAM's START section and early device sections; then come
    RAM frames (each exactly one whole PART section, in any order), then the rest. Several threads
    may call :meth:`encode`, which takes no lock and releases the GIL, and :meth:`append`, which is
    serialised.

    As a context manager, it aborts the sink unless :meth:`finish` was reached.

    Args:
        sink: where the bytes go; the writer commits or aborts it.
        level: compression level, or ``frames.LEVEL_NONE``.
        later_pages_win: a page may be written repeatedly, and the last record counts; each run's
            first record must then name its block.
        key: encrypts the file.
        increment: unwritten pages are those of the parent that the manifest names.

    Raises:
        HostError: the package for encryption is missing.
    """

    def __init__(
        self,
        sink: Sink,
        *,
        level: int = LEVEL_DEFAULT,
        later_pages_win: bool = False,
        key: DataKey | None = None,
        increment: bool = False,
    ) -> None:
        self._sink = sink
        self._seal = None if key is None else Seal.new(key)
        self._level = check_level(level)
        self._later_pages_win = later_pages_win
        self._increment = increment
        self._lock = Lock()
        self._builder = IndexBuilder()
        self._closed = False
        self._stream_bytes = 0
        self._file_bytes = 0

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_error: object) -> None:
        self.abort()

    @property
    def description(self) -> str:
        """The sink's name in error messages."""
        return self._sink.description

    @property
    def stream_bytes(self) -> int:
        """Length of the decompressed payload so far."""
        return self._stream_bytes

    @property
    def file_bytes(self) -> int:
        """Bytes that the sink has taken so far."""
        return self._file_bytes

    def encode(self, raw: BytesLike, level: int | None = None) -> EncodedFrame:
        """Compress one frame, by default at the writer's level, and seal it if the file is
        encrypted. Thread-safe.

        Raises:
            UsageError: longer than ``frames.FRAME_RAW_MAX_BYTES``.
        """
        frame = compress_frame(raw, self._level if level is None else level)
        if self._seal is None:
            return frame
        sealed = self._seal.seal_frame(frame.data)
        return EncodedFrame(sealed, frame.raw_bytes, digest_of(sealed))

    def append(self, frame: EncodedFrame, runs: Sequence[PageRun] | BytesLike = b"") -> int:
        """Write a frame; return its number.

        Args:
            runs: the pages in it, as :class:`PageRun` or packed (``index_builder.PACKED_RUN``); a
                buffer may be reused once the call returns.

        Raises:
            SinkError: the sink cannot take it.
        """
        packed = runs if isinstance(runs, bytes | bytearray | memoryview) else pack_runs(runs)
        with self._lock:
            self._check_open()
            self._write(frame.data)
            self._stream_bytes += frame.raw_bytes
            return self._builder.add_frame(frame, packed)

    def append_stream(self, raw: BytesLike) -> None:
        """Compress and write a piece of the stream without pages, in as many frames as needed; an
        increment's head, its first such piece, is one frame.

        Raises:
            SinkError: the sink cannot take it.
        """
        view = memoryview(raw)
        if self._increment and self._builder.frame_count == 0:
            self.append(self.encode(INCREMENT_PREAMBLE))
            self.append(self.encode(view))
            return
        for start in range(0, view.nbytes, FRAME_RAW_TARGET_BYTES):
            self.append(self.encode(view[start : start + FRAME_RAW_TARGET_BYTES]))

    def finish(self, manifest: Manifest, *, key: HostKey | None = None) -> str:
        """Write index, manifest, trailer and seek table, commit the sink, return the id.

        Args:
            manifest: its ``stream_bytes`` is set to the written length.
            key: marks the snapshot as taken on this host by this user.

        Raises:
            SinkError: the sink cannot take it; it is aborted.
            InternalError: the runs do not make a correct index.
        """
        with self._lock:
            self._check_open()
            if self._increment != (manifest.parent is not None):
                raise InternalError("an increment needs a parent, and nothing else has one")
            manifest = msgspec.structs.replace(
                manifest,
                format=INCREMENT_FORMAT if self._increment else FORMAT,
                stream_bytes=self._stream_bytes,
            )
            index = self._builder.build(
                manifest.blocks,
                target_page_bytes=manifest.target_page_bytes,
                later_pages_win=self._later_pages_win,
            )
            snapshot_id = self._write_tail(index, manifest, key)
            self._closed = True
        self._sink.commit()
        return snapshot_id

    def abort(self) -> None:
        """Abort the sink. Does nothing after :meth:`finish`."""
        with self._lock:
            if self._closed:
                return
            self._closed = True
        self._sink.abort()

    def _write_tail(self, index: Index, manifest: Manifest, key: HostKey | None) -> str:
        seal = self._seal
        index_content = encode_index(index)
        if seal is not None:
            index_content = seal.seal(KIND_INDEX, 0, index_content)
        manifest = msgspec.structs.replace(manifest, mark="" if key is None else NO_MARK)
        manifest_content = encode_manifest(manifest)
        if key is not None:
            manifest_content = key.marked(digest_of(index_content), manifest_content)
        if seal is not None:
            manifest_content = seal.seal(KIND_MANIFEST, 0, manifest_content)
        seal_frame = b"" if seal is None else encode_seal(seal)
        index_offset = self._file_bytes + len(seal_frame)
        trailer = trailer_of(
            index_content, manifest_content, index_offset, seal_bytes=len(seal_frame)
        )
        own = (
            *([seal_frame] if seal_frame else ()),
            skippable_frame(INDEX_FRAME_MAGIC, index_content),
            skippable_frame(MANIFEST_FRAME_MAGIC, manifest_content),
            encode_trailer(trailer),
        )
        for frame in own:
            self._write(frame)
        sizes = index.frame_sizes(sealed=seal is not None)
        self._write(encode_seek_table([*sizes, *((len(frame), 0) for frame in own)]))
        return trailer.snapshot_id

    def _write(self, data: BytesLike) -> None:
        self._sink.write(data)
        self._file_bytes += len(data)

    def _check_open(self) -> None:
        if self._closed:
            raise UsageError("this snapshot is already finished or given up")


def encode_manifest(manifest: Manifest) -> bytes:
    """Encode the manifest for the file: JSON, indented, with a final newline."""
    return msgspec.json.format(msgspec.json.encode(manifest), indent=1) + b"\n"
