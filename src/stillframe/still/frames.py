"""A zstd frame: compression, and decompression within bounds.

The only module that knows the zstd binding: ``compression.zstd`` of Python 3.14, or its backport.
Both release the GIL while they work, so several threads can compress. Format: RFC 8878 and zstd's
``doc/zstd_compression_format.md``.
"""

from __future__ import annotations

import struct
import sys
import threading
from typing import Final, Literal, NamedTuple, get_args

from blake3 import blake3

from stillframe.errors import DataError, UsageError, check_choice

if sys.version_info >= (3, 14):
    from compression import zstd
else:
    from backports import zstd

BytesLike = bytes | bytearray | memoryview
Compression = Literal["zstd", "none"]
COMPRESSIONS: Final[tuple[Compression, ...]] = get_args(Compression)

FRAME_RAW_TARGET_BYTES: Final = 1 << 20
"""Target size of a frame's decompressed data."""

FRAME_RAW_MAX_BYTES: Final = 64 << 20
"""Upper bound on a frame's decompressed size, against decompression bombs."""

_WINDOW_LOG_MAX: Final = 26  # 2**26 = FRAME_RAW_MAX_BYTES: the largest window a frame can need

LEVEL_NONE: Final = zstd.CompressionParameter.compression_level.bounds()[0]
"""zstd's lowest level (-131072) finds no matches and writes raw blocks with the content checksum,
at the speed of the checksum. This is our "no compression"."""

LEVEL_MIN: Final = -50
LEVEL_MAX: Final = 19
LEVEL_DEFAULT: Final = 1

SKIPPABLE_HEADER: Final = struct.Struct("<II")  # magic, content length

_per_thread = threading.local()


class EncodedFrame(NamedTuple):
    """A compressed frame, ready for the file. ``digest``: BLAKE3 of ``data`` (32 bytes)."""

    data: BytesLike
    raw_bytes: int
    digest: bytes


def check_level(level: int) -> int:
    """Return the level if it is supported.

    Raises:
        UsageError: it is neither ``LEVEL_NONE`` nor within ``LEVEL_MIN`` to ``LEVEL_MAX``.
    """
    if level != LEVEL_NONE and not LEVEL_MIN <= level <= LEVEL_MAX:
        raise UsageError(
            f"compression level {level} is not supported",
            remedy=f"choose {LEVEL_MIN} to {LEVEL_MAX}, or none",
        )
    return level


def choose_level(compression: Compression, level: int | None) -> int:
    """Return the level for a caller's options; the default without one.

    Raises:
        UsageError: there is no such compression, or no such level of it.
    """
    check_choice("compression", compression, COMPRESSIONS)
    if compression == "zstd":
        return check_level(LEVEL_DEFAULT if level is None else level)
    if level is not None:
        raise UsageError("compression none has no level")
    return LEVEL_NONE


def compress_frame(raw: BytesLike, level: int) -> EncodedFrame:
    """Compress ``raw`` into one frame that records its content size and content checksum.

    Pure, thread-safe, and almost entirely without the GIL.

    Raises:
        UsageError: ``raw`` is larger than ``FRAME_RAW_MAX_BYTES``, or the level is unknown.
    """
    raw_bytes = memoryview(raw).nbytes
    if raw_bytes > FRAME_RAW_MAX_BYTES:
        raise UsageError(
            f"a frame of {raw_bytes} bytes is too large",
            remedy=f"split it at {FRAME_RAW_MAX_BYTES} bytes or below",
        )
    data = compress_table(raw, level)
    return EncodedFrame(data, raw_bytes, digest_of(data))


def compress_table(raw: BytesLike, level: int) -> bytes:
    """Like :func:`compress_frame`, for any size and without a digest."""
    return _compressor(level).compress(raw, zstd.ZstdCompressor.FLUSH_FRAME)


def _compressor(level: int) -> zstd.ZstdCompressor:
    """Return this thread's compressor for the level; its context (about 1 MiB) is reused."""
    compressors: dict[int, zstd.ZstdCompressor] | None = getattr(_per_thread, "compressors", None)
    if compressors is None:
        compressors = _per_thread.compressors = {}
    found = compressors.get(level)
    if found is None:
        parameter = zstd.CompressionParameter
        options: dict[int, int] = {
            parameter.compression_level: check_level(level),
            parameter.checksum_flag: 1,
        }
        found = compressors[level] = zstd.ZstdCompressor(options=options)
    return found


def decompress_frame(data: BytesLike, raw_bytes: int) -> bytes:
    """Decompress exactly one frame that must yield exactly ``raw_bytes`` bytes.

    Raises:
        DataError: damaged (content checksum included), not one whole frame, or of another size.
    """
    if not 0 <= raw_bytes <= FRAME_RAW_MAX_BYTES:
        raise DataError(
            f"a frame claims to hold {raw_bytes} bytes",
            why=f"at most {FRAME_RAW_MAX_BYTES} are allowed",
        )
    return _decompress_bounded(data, raw_bytes, _WINDOW_LOG_MAX)


def decompress_table(data: BytesLike, raw_bytes: int) -> bytes:
    """As :func:`decompress_frame`, for a table whose size the caller has bounded itself."""
    return _decompress_bounded(data, raw_bytes, 30)


def _decompress_bounded(data: BytesLike, raw_bytes: int, window_log_max: int) -> bytes:
    options: dict[int, int] = {zstd.DecompressionParameter.window_log_max: window_log_max}
    decompressor = zstd.ZstdDecompressor(options=options)
    try:
        # One byte more than allowed detects a frame with more content without expanding it.
        raw = decompressor.decompress(data, max_length=raw_bytes + 1)
    except (zstd.ZstdError, MemoryError) as error:
        raise DataError("a compressed frame is damaged", why=str(error)) from error
    if len(raw) != raw_bytes:
        more = "more than " if len(raw) > raw_bytes else f"{len(raw)} bytes, not "
        raise DataError(f"a compressed frame holds {more}the {raw_bytes} bytes that it should")
    if not decompressor.eof or decompressor.unused_data:
        raise DataError("a compressed frame does not end where it should")
    return raw


def digest_of(*parts: BytesLike) -> bytes:
    """Return the BLAKE3 digest (32 bytes) of the concatenated parts."""
    hasher = blake3()
    for part in parts:
        hasher.update(part)
    return hasher.digest()


def skippable_frame(magic: int, content: BytesLike) -> bytes:
    """Return a frame that zstd decoders skip (RFC 8878 section 3.1.2).

    Raises:
        UsageError: the content is 4 GiB or longer.
    """
    length = memoryview(content).nbytes
    if length >= 1 << 32:
        raise UsageError(f"{length} bytes do not fit in a skippable frame")
    return SKIPPABLE_HEADER.pack(magic, length) + bytes(content)
