"""Pictures of the framebuffer as PNG and PPM, with nothing but zlib.

Source: W3C "Portable Network Graphics", sections 5 and 11; netpbm ppm(5).
"""

from __future__ import annotations

import struct
import zlib

import msgspec

_PNG_SIGNATURE = b"\x89PNG\r\n\x1a\n"
_DEPTH_BITS, _COLOUR_RGB = 8, 2
_LEVEL = 6


class Picture(msgspec.Struct, frozen=True, kw_only=True):
    """A picture: ``xrgb`` has four bytes a pixel (blue, green, red, unused), rows packed."""

    width: int
    height: int
    xrgb: bytes

    def rgb(self) -> bytes:
        """Three bytes a pixel: red, green, blue."""
        pixels = bytearray(3 * self.width * self.height)
        pixels[0::3] = self.xrgb[2::4]
        pixels[1::3] = self.xrgb[1::4]
        pixels[2::3] = self.xrgb[0::4]
        return bytes(pixels)

    def ppm(self) -> bytes:
        """The picture as a raw PPM file."""
        return f"P6\n{self.width} {self.height}\n255\n".encode() + self.rgb()

    def png(self) -> bytes:
        """The picture as a PNG file."""
        rgb = self.rgb()
        row_bytes = 3 * self.width
        # Each row has a filter type in front: none.
        rows = b"".join(
            b"\0" + rgb[start : start + row_bytes] for start in range(0, len(rgb), row_bytes)
        )
        header = struct.pack(">IIBBBBB", self.width, self.height, _DEPTH_BITS, _COLOUR_RGB, 0, 0, 0)
        return b"".join(
            (
                _PNG_SIGNATURE,
                _chunk(b"IHDR", header),
                _chunk(b"IDAT", zlib.compress(rows, _LEVEL)),
                _chunk(b"IEND", b""),
            )
        )


def _chunk(kind: bytes, data: bytes) -> bytes:
    return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))
