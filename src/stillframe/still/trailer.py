"""The end of a snapshot file: our trailer, and the seek table of zstd's seekable format.

Both are skippable frames (RFC 8878 section 3.1.2), little-endian. The seek table follows
zstd's ``contrib/seekable_format/zstd_seekable_compression_format.md`` 0.1.0: it lists every
frame before it, skippable ones with a decompressed size of 0.
"""

from __future__ import annotations

import struct
from collections.abc import Iterable
from typing import Final, NamedTuple

from stillframe.errors import DataError
from stillframe.still.frames import SKIPPABLE_HEADER, digest_of, skippable_frame
from stillframe.still.sinks import Source

INDEX_FRAME_MAGIC: Final = 0x184D2A50
MANIFEST_FRAME_MAGIC: Final = 0x184D2A51
TRAILER_FRAME_MAGIC: Final = 0x184D2A52
SEEK_TABLE_FRAME_MAGIC: Final = 0x184D2A5E
SEEKABLE_MAGIC: Final = 0x8F92EAB1
TRAILER_MAGIC: Final = b"STILLTRL"
TRAILER_VERSION: Final = 1

OWN_FRAMES: Final = 3
"""Index, manifest and trailer: skippable frames between payload and seek table. An encrypted file
has its seal frame, too."""

SEEK_FOOTER: Final = struct.Struct("<IBI")
_SEEK_ENTRY_BYTES = 8
_TRAILER = struct.Struct("<8sHHIQQQQ32s32s")
_CHECK_BYTES = 16
_SEALED = 1
"""The trailer's flag for a file with encrypted parts."""
TRAILER_FRAME_BYTES: Final = SKIPPABLE_HEADER.size + _TRAILER.size + _CHECK_BYTES


class Trailer(NamedTuple):
    """Where index and manifest (their contents, without frame headers) are in the file.

    ``seal_bytes``: length of the seal frame before the index's frame; 0 if nothing is encrypted.
    """

    index_offset: int
    index_bytes: int
    manifest_offset: int
    manifest_bytes: int
    index_digest: bytes
    manifest_digest: bytes
    seal_bytes: int = 0

    @property
    def snapshot_id(self) -> str:
        """BLAKE3 of the two digests, 64 hexadecimal digits; identifies the whole content."""
        return digest_of(self.index_digest, self.manifest_digest).hex()


def encode_trailer(trailer: Trailer) -> bytes:
    """Return the trailer as a skippable frame of ``TRAILER_FRAME_BYTES``."""
    *fields, seal_bytes = trailer
    flags = _SEALED if seal_bytes else 0
    content = _TRAILER.pack(TRAILER_MAGIC, TRAILER_VERSION, flags, seal_bytes, *fields)
    return skippable_frame(TRAILER_FRAME_MAGIC, content + digest_of(content)[:_CHECK_BYTES])


def decode_trailer(frame: bytes, offset_bytes: int) -> Trailer:
    """Decode a trailer that was read at ``offset_bytes`` of the file.

    Raises:
        DataError: damaged, of an unknown version, or it points outside.
    """
    if len(frame) != TRAILER_FRAME_BYTES or SKIPPABLE_HEADER.unpack_from(frame) != (
        TRAILER_FRAME_MAGIC,
        TRAILER_FRAME_BYTES - SKIPPABLE_HEADER.size,
    ):
        raise DataError(
            "the snapshot has no trailer",
            why="it is damaged, or another program wrote it",
            offset_bytes=offset_bytes,
        )
    content = frame[SKIPPABLE_HEADER.size : -_CHECK_BYTES]
    if digest_of(content)[:_CHECK_BYTES] != frame[-_CHECK_BYTES:]:
        raise DataError("the snapshot's trailer is damaged", offset_bytes=offset_bytes)
    magic, version, flags, seal_bytes, *fields = _TRAILER.unpack(content)
    if (
        magic != TRAILER_MAGIC
        or version != TRAILER_VERSION
        or flags != (_SEALED if seal_bytes else 0)
    ):
        raise DataError(
            f"the snapshot's format has version {version}, only {TRAILER_VERSION} is known",
            remedy="read it with a newer Stillframe",
        )
    trailer = Trailer._make((*fields, seal_bytes))
    index_end = trailer.index_offset + trailer.index_bytes
    manifest_end = trailer.manifest_offset + trailer.manifest_bytes
    if (
        trailer.index_offset < SKIPPABLE_HEADER.size + seal_bytes
        or trailer.manifest_offset != index_end + SKIPPABLE_HEADER.size
        or manifest_end != offset_bytes
    ):
        raise DataError(
            "the snapshot's trailer points to the wrong places", offset_bytes=offset_bytes
        )
    return trailer


def encode_seek_table(sizes: Iterable[tuple[int, int]]) -> bytes:
    """Return the seek table frame for frames of (compressed, decompressed) sizes."""
    entries = b"".join(struct.pack("<II", stored, raw) for stored, raw in sizes)
    footer = SEEK_FOOTER.pack(len(entries) // _SEEK_ENTRY_BYTES, 0, SEEKABLE_MAGIC)
    return skippable_frame(SEEK_TABLE_FRAME_MAGIC, entries + footer)


def read_trailer(source: Source) -> tuple[Trailer, int]:
    """Return a snapshot file's trailer, and where its seek table starts. Cheap: two short reads.

    Raises:
        DataError: not a snapshot, damaged, or of an unknown version.
    """
    size = source.size_bytes
    footer_offset = max(0, size - SEEK_FOOTER.size)
    footer = source.read_at(footer_offset, size - footer_offset)
    seek_table_offset = size - seek_table_bytes(footer, size)
    offset = seek_table_offset - TRAILER_FRAME_BYTES
    return decode_trailer(source.read_at(offset, TRAILER_FRAME_BYTES), offset), seek_table_offset


def seek_table_bytes(footer: bytes, file_bytes: int) -> int:
    """Return the length of the seek table frame, from the last 9 bytes of a file.

    Raises:
        DataError: there is none, or it does not fit in the file.
    """
    if len(footer) != SEEK_FOOTER.size:
        raise DataError("the file is too short to be a snapshot", offset_bytes=file_bytes)
    frames, descriptor, magic = SEEK_FOOTER.unpack(footer)
    if magic != SEEKABLE_MAGIC:
        raise DataError(
            "the file does not end like a snapshot",
            why="it is truncated, or not a .still file",
            offset_bytes=file_bytes - SEEK_FOOTER.size,
        )
    length: int = SKIPPABLE_HEADER.size + frames * _SEEK_ENTRY_BYTES + SEEK_FOOTER.size
    if descriptor or frames < OWN_FRAMES or length + TRAILER_FRAME_BYTES > file_bytes:
        raise DataError(
            "the snapshot's seek table is damaged", offset_bytes=file_bytes - SEEK_FOOTER.size
        )
    return length


def seek_table_matches(frame: bytes, sizes: Iterable[tuple[int, int]]) -> bool:
    """Return whether a file's seek table frame lists exactly these frames."""
    return frame == encode_seek_table(sizes)


def trailer_of(
    index: bytes, manifest: bytes, index_frame_offset: int, *, seal_bytes: int = 0
) -> Trailer:
    """Return the trailer for consecutive index and manifest frames at an offset."""
    index_offset = index_frame_offset + SKIPPABLE_HEADER.size
    return Trailer(
        index_offset=index_offset,
        index_bytes=len(index),
        manifest_offset=index_offset + len(index) + SKIPPABLE_HEADER.size,
        manifest_bytes=len(manifest),
        index_digest=digest_of(index),
        manifest_digest=digest_of(manifest),
        seal_bytes=seal_bytes,
    )
