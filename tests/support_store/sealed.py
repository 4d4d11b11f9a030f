"""Small encrypted snapshots, and what somebody without the key can do to them."""

from __future__ import annotations

from stillframe.still.frames import SKIPPABLE_HEADER, skippable_frame
from stillframe.still.sealing import DataKey, SealHeader, Unlock
from stillframe.still.snapshot import Snapshot
from stillframe.still.trailer import (
    INDEX_FRAME_MAGIC,
    MANIFEST_FRAME_MAGIC,
    SEEK_FOOTER,
    TRAILER_FRAME_BYTES,
    decode_trailer,
    encode_seek_table,
    encode_trailer,
    seek_table_bytes,
    trailer_of,
)
from stillframe.still.writer import SnapshotWriter
from tests.support_store.memory import MemorySink, MemorySource
from tests.support_store.small import head, manifest, random_ram, tail, write_ram

KEY = DataKey(b"name of the key.", bytes(range(32)))


def unlock(header: SealHeader) -> bytes:
    """As somebody who has the key."""
    return KEY.secret


def sealed_file(seed: int = 1, *, key: DataKey = KEY, level: int = 1) -> bytes:
    """The bytes of a small encrypted snapshot."""
    sink = MemorySink()
    with SnapshotWriter(sink, level=level, key=key) as writer:
        writer.append_stream(head())
        write_ram(writer, random_ram(seed))
        writer.append_stream(tail())
        writer.finish(manifest())
    return sink.content


def open_sealed(content: bytes, given: Unlock | None = unlock) -> Snapshot:
    """An encrypted snapshot opened from bytes."""
    return Snapshot(MemorySource(content), given)


class SealedParts:
    """A file taken apart without its key: what is visible of it. Change it, then :meth:`join`."""

    def __init__(self, content: bytes) -> None:
        size = len(content)
        seek = size - seek_table_bytes(content[-SEEK_FOOTER.size :], size)
        place = seek - TRAILER_FRAME_BYTES
        trailer = decode_trailer(content[place:seek], place)
        seal_end = trailer.index_offset - SKIPPABLE_HEADER.size
        self.seal = content[seal_end - trailer.seal_bytes : seal_end]
        self.frames = _skippable(content[: seal_end - trailer.seal_bytes])
        self.index = content[trailer.index_offset :][: trailer.index_bytes]
        self.manifest = content[trailer.manifest_offset :][: trailer.manifest_bytes]

    def join(self) -> bytes:
        """The file, with digests, trailer and seek table that match."""
        payload = b"".join(self.frames)
        start = len(payload) + len(self.seal)
        trailer = trailer_of(self.index, self.manifest, start, seal_bytes=len(self.seal))
        own = [
            self.seal,
            skippable_frame(INDEX_FRAME_MAGIC, self.index),
            skippable_frame(MANIFEST_FRAME_MAGIC, self.manifest),
            encode_trailer(trailer),
        ]
        own = [frame for frame in own if frame]
        table = encode_seek_table((len(frame), 0) for frame in [*self.frames, *own])
        return b"".join([payload, *own, table])


def _skippable(payload: bytes) -> list[bytes]:
    frames, start = [], 0
    while start < len(payload):
        _, length = SKIPPABLE_HEADER.unpack_from(payload, start)
        frames.append(payload[start : start + SKIPPABLE_HEADER.size + length])
        start += len(frames[-1])
    return frames
