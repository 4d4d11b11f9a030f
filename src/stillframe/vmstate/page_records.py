"""Page records of QEMU's ``ram`` section, encoded in runs by pure functions that return bytes.

Source: QEMU ``migration/ram.c``, ``save_page_header`` and ``save_zero_page``.
"""

from __future__ import annotations

import sys
from array import array

from stillframe.errors import UsageError
from stillframe.vmstate.devices import encode_name
from stillframe.vmstate.wire import RamFlag

_WORD_BYTES = 8
_ZERO_RECORD_BYTES = _WORD_BYTES + 1
_FLAG_BITS = 0x3FF
_OFFSET_LIMIT = 1 << 64
# Plain ints: an IntFlag caches every new combination forever.
_PAGE = int(RamFlag.PAGE)
_ZERO = int(RamFlag.ZERO)
_CONTINUE = int(RamFlag.CONTINUE)


def page_records(
    offset_bytes: int, data: bytes | memoryview, *, block: str | None, page_bytes: int = 4096
) -> bytes:
    """Encode adjacent pages with their content.

    Args:
        offset_bytes: of the first page, in its block.
        data: a whole number of target pages.
        block: the block's name, or None for the block of the previous record.

    Raises:
        UsageError: the offset or the length is no multiple of a page, or the name is malformed.
    """
    pages, odd = divmod(len(data), page_bytes)
    if odd or not pages:
        raise UsageError(f"{len(data)} bytes are no whole number of pages")
    words = _words(offset_bytes, pages, page_bytes, _PAGE | _CONTINUE)
    content = memoryview(data)
    parts: list[bytes | memoryview] = [_head(offset_bytes, _PAGE, block)]
    for at in range(pages):
        if at:
            parts.append(words[at * _WORD_BYTES : (at + 1) * _WORD_BYTES])
        parts.append(content[at * page_bytes : (at + 1) * page_bytes])
    return b"".join(parts)


def zero_records(
    offset_bytes: int, pages: int, *, block: str | None, page_bytes: int = 4096
) -> bytes:
    """Encode adjacent zero pages; arguments as for :func:`page_records`."""
    words = _words(offset_bytes + page_bytes, pages - 1, page_bytes, _ZERO | _CONTINUE)
    rest = bytearray(_ZERO_RECORD_BYTES * (pages - 1))
    for position in range(_WORD_BYTES):
        rest[position::_ZERO_RECORD_BYTES] = words[position::_WORD_BYTES]
    return _head(offset_bytes, _ZERO, block) + b"\0" + rest


def detected_records(
    offset_bytes: int, data: bytes, *, block: str | None, page_bytes: int = 4096
) -> tuple[bytes, int]:
    """Encode adjacent pages, and the zero pages among them as such.

    Returns:
        The records, and the number of zero pages.
    """
    zero_page = bytes(page_bytes)
    pages = len(data) // page_bytes
    parts = []
    zeroes = at = 0
    while at < pages:
        is_zero = data.startswith(zero_page, at * page_bytes)
        end = at + 1
        while end < pages and data.startswith(zero_page, end * page_bytes) == is_zero:
            end += 1
        offset, name = offset_bytes + at * page_bytes, block if at == 0 else None
        if is_zero:
            parts.append(zero_records(offset, end - at, block=name, page_bytes=page_bytes))
            zeroes += end - at
        else:
            run = memoryview(data)[at * page_bytes : end * page_bytes]
            parts.append(page_records(offset, run, block=name, page_bytes=page_bytes))
        at = end
    return b"".join(parts), zeroes


def _words(first_bytes: int, pages: int, page_bytes: int, flags: int) -> bytes:
    """Return the first words of the records of adjacent pages."""
    words = array(
        "Q", range(first_bytes | flags, (first_bytes | flags) + pages * page_bytes, page_bytes)
    )
    if sys.byteorder == "little":
        words.byteswap()
    return words.tobytes()


def _head(offset_bytes: int, kind: int, block: str | None) -> bytes:
    if offset_bytes & _FLAG_BITS or not 0 <= offset_bytes < _OFFSET_LIMIT:
        raise UsageError(f"offset or length {offset_bytes} is no multiple of a page")
    if block is None:
        return (offset_bytes | kind | _CONTINUE).to_bytes(_WORD_BYTES, "big")
    name = encode_name(block)
    return (offset_bytes | kind).to_bytes(_WORD_BYTES, "big") + bytes((len(name),)) + name
