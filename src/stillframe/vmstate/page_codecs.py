"""Decoders for XBZRLE deltas and zlib-compressed pages."""

from __future__ import annotations

import zlib

from stillframe.errors import DataError


def apply_xbzrle(delta: bytes, page: bytes, *, offset_bytes: int) -> bytes:
    """Apply an XBZRLE delta to a page's earlier content (QEMU ``docs/xbzrle.txt``).

    The delta is a sequence of pairs: the length of an unchanged run, then the length of a changed
    run, followed by its new bytes. Lengths are ULEB128 of at most two bytes.

    Args:
        offset_bytes: the delta's offset in the stream, for errors.

    Raises:
        DataError: the delta is malformed or goes beyond the page.
    """
    result = bytearray(page)
    position = 0
    done = 0
    while position < len(delta):
        kept, position = _uleb128(delta, position, offset_bytes)
        if kept == 0 and done > 0:
            raise _malformed(offset_bytes, "a run of unchanged bytes is empty")
        changed, position = _uleb128(delta, position, offset_bytes)
        start = done + kept
        done = start + changed
        end = position + changed
        if changed == 0 or done > len(result) or end > len(delta):
            raise _malformed(offset_bytes, "a run of changed bytes is empty or too long")
        result[start:done] = delta[position:end]
        position = end
    return bytes(result)


def _uleb128(delta: bytes, position: int, offset_bytes: int) -> tuple[int, int]:
    if position >= len(delta):
        raise _malformed(offset_bytes, "a length is missing")
    low = delta[position]
    if low < 0x80:
        return low, position + 1
    if position + 1 >= len(delta) or delta[position + 1] >= 0x80:
        raise _malformed(offset_bytes, "a length has more than two bytes")
    return (low & 0x7F) | delta[position + 1] << 7, position + 2


def _malformed(offset_bytes: int, why: str) -> DataError:
    return DataError("an XBZRLE page is malformed", why=why, offset_bytes=offset_bytes)


def inflate_page(packed: bytes, page_bytes: int, *, offset_bytes: int) -> bytes:
    """Unpack a page sent with capability ``compress`` (QEMU 2.4 to 9.0).

    Raises:
        DataError: it is no zlib stream, or does not hold exactly one page.
    """
    inflater = zlib.decompressobj()
    try:
        page = inflater.decompress(packed, page_bytes + 1)
    except zlib.error as error:
        raise DataError(
            "a compressed page is damaged", why=str(error), offset_bytes=offset_bytes
        ) from error
    if len(page) != page_bytes or not inflater.eof or inflater.unused_data:
        raise DataError(
            "a compressed page is damaged",
            why=f"it does not hold exactly {page_bytes} bytes",
            offset_bytes=offset_bytes,
        )
    return page


def packed_limit_bytes(page_bytes: int) -> int:
    """Return the length of the longest zlib stream of one page (zlib's ``compressBound``)."""
    return page_bytes + (page_bytes >> 12) + (page_bytes >> 14) + (page_bytes >> 25) + 13
