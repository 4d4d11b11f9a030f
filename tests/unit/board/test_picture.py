"""Pictures of the framebuffer, read back by other means."""

from __future__ import annotations

import struct
import zlib

from hypothesis import given
from hypothesis import strategies as st

from stillframe.board.hardware.framebuffer import Picture


def unpacked(data: bytes) -> tuple[int, int, bytes]:
    """Width, height and RGB bytes of a PNG without filters; checks every CRC."""
    assert data[:8] == b"\x89PNG\r\n\x1a\n"
    chunks: dict[bytes, bytes] = {}
    at = 8
    while at < len(data):
        length, kind = struct.unpack_from(">I4s", data, at)
        body = data[at + 8 : at + 8 + length]
        (crc,) = struct.unpack_from(">I", data, at + 8 + length)
        assert crc == zlib.crc32(kind + body)
        chunks[kind] = body
        at += 12 + length
    assert list(chunks) == [b"IHDR", b"IDAT", b"IEND"]
    width, height, *rest = struct.unpack(">IIBBBBB", chunks[b"IHDR"])
    assert rest == [8, 2, 0, 0, 0]
    rows = zlib.decompress(chunks[b"IDAT"])
    assert set(rows[:: 3 * width + 1]) == {0}
    kept = bytearray(rows)
    del kept[:: 3 * width + 1]
    return width, height, bytes(kept)


def test_colours_and_places() -> None:
    pixels = (0xFF0000, 0x00FF00, 0x0000FF, 0x123456, 0xFFFFFF, 0)
    xrgb = b"".join(struct.pack("<I", 0xEE000000 | pixel) for pixel in pixels)
    picture = Picture(width=3, height=2, xrgb=xrgb)
    rgb = b"".join(pixel.to_bytes(3, "big") for pixel in pixels)
    assert picture.ppm() == b"P6\n3 2\n255\n" + rgb
    assert unpacked(picture.png()) == (3, 2, rgb)


@given(st.integers(1, 9), st.integers(1, 9), st.data())
def test_any_picture_comes_back(width: int, height: int, data: st.DataObject) -> None:
    size = 4 * width * height
    xrgb = data.draw(st.binary(min_size=size, max_size=size))
    picture = Picture(width=width, height=height, xrgb=xrgb)
    assert unpacked(picture.png()) == (width, height, picture.rgb())
