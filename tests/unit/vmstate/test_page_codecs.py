"""XBZRLE and zlib pages."""

from __future__ import annotations

import pytest

from stillframe.errors import DataError
from stillframe.vmstate.page_codecs import apply_xbzrle

OLD = bytes(range(256)) * 16


@pytest.mark.parametrize(
    ("delta", "changes"),
    [
        (b"", {}),
        (b"\0\1x", {0: b"x"}),
        (b"\x05\2xy\x03\1z", {5: b"xy", 10: b"z"}),
        (b"\xff\x1f\1x", {4095: b"x"}),
        (b"\x00\x80\x20" + b"n" * 4096, {0: b"n" * 4096}),
    ],
)
def test_xbzrle(delta: bytes, changes: dict[int, bytes]) -> None:
    expected = bytearray(OLD)
    for offset, new in changes.items():
        expected[offset : offset + len(new)] = new
    assert apply_xbzrle(delta, OLD, offset_bytes=0) == bytes(expected)


@pytest.mark.parametrize(
    "delta",
    [
        b"\0",
        b"\0\0",
        b"\0\2x",
        b"\0\1x\0\1y",
        b"\x80\x20\1x",
        b"\xff\x1f\2xy",
        b"\x80\x80\x01\1x",
        b"\0\x80",
        b"\x05\1x\x05",
        b"\0\x81\x20" + b"n" * 4097,
    ],
)
def test_xbzrle_refuses(delta: bytes) -> None:
    with pytest.raises(DataError, match="XBZRLE") as caught:
        apply_xbzrle(delta, OLD, offset_bytes=77)
    assert caught.value.offset_bytes == 77
