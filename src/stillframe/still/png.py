"""PNG encoding of a picture (RFC 2083), with only zlib."""

from __future__ import annotations

import struct
import zlib
from typing import Final

_SIGNATURE: Final = b"\x89PNG\r\n\x1a\n"
_DEPTH_BITS: Final = 8
_COLOUR_RGB: Final = 2


def png(width: int, height: int, rgb: bytes, *, level: int = 6) -> bytes:
    """Return a PNG file of ``width * height`` pixels, three bytes each, row by row."""
    row_bytes = 3 * width
    # Each row starts with its filter type: none.
    rows = b"".join(
        b"\0" + rgb[start : start + row_bytes] for start in range(0, len(rgb), row_bytes)
    )
    header = struct.pack(">IIBBBBB", width, height, _DEPTH_BITS, _COLOUR_RGB, 0, 0, 0)
    parts = ((b"IHDR", header), (b"IDAT", zlib.compress(rows, level)), (b"IEND", b""))
    return _SIGNATURE + b"".join(_chunk(kind, data) for kind, data in parts)


def _chunk(kind: bytes, data: bytes) -> bytes:
    return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))
