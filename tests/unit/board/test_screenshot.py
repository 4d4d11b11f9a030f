"""Pictures of the framebuffer."""

from __future__ import annotations

import struct
import zlib

from stillframe.board.hardware.framebuffer import Picture

# red, green, blue, white over black, grey, and two with something in the unused byte
XRGB = bytes.fromhex("0000ff00 00ff0000 ff000000 ffffff00 00000000 80808000 030201ff 010203aa")
RGB = bytes.fromhex("ff0000 00ff00 0000ff ffffff 000000 808080 010203 030201")
PICTURE = Picture(width=4, height=2, xrgb=XRGB)


def test_ppm() -> None:
    assert PICTURE.ppm() == b"P6\n4 2\n255\n" + RGB


def test_png() -> None:
    data = PICTURE.png()
    assert data[:8] == b"\x89PNG\r\n\x1a\n"
    chunks = []
    at = 8
    while at < len(data):
        length, kind = struct.unpack_from(">I4s", data, at)
        body = data[at + 8 : at + 8 + length]
        (checksum,) = struct.unpack_from(">I", data, at + 8 + length)
        assert checksum == zlib.crc32(kind + body)
        chunks.append((kind, body))
        at += 12 + length
    assert [kind for kind, _ in chunks] == [b"IHDR", b"IDAT", b"IEND"]
    assert struct.unpack(">IIBBBBB", chunks[0][1]) == (4, 2, 8, 2, 0, 0, 0)
    rows = zlib.decompress(chunks[1][1])
    assert rows == b"\0" + RGB[:12] + b"\0" + RGB[12:]
