"""RAM at fixed offsets in the file: capability mapped-ram, QEMU 9.0 and later.

Source: QEMU ``docs/devel/migration/mapped-ram.rst``, ``migration/ram.c``. The bitmap has the byte
order of the host that wrote it; only little-endian is supported.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from typing import NamedTuple

from stillframe.errors import DataError
from stillframe.vmstate.records import Pages, ZeroRun
from stillframe.vmstate.source import StreamSource

HEADER_BYTES = 28
HEADER_VERSION = 1
_BITMAP_CHUNK_BYTES = 1 << 15
_RUN_LIMIT_BYTES = 1 << 20
_FILE_LIMIT_BYTES = 1 << 60
_RUN = re.compile(r"1+|0+")


class MappedBlock(NamedTuple):
    """The place of a block's bitmap and pages: absolute byte offsets in the file.

    Both are 0 for a block that was left out (x-ignore-shared).
    """

    bitmap_offset: int
    pages_offset: int
    used_length_bytes: int


def read_mapped_header(
    source: StreamSource, used_length_bytes: int, page_bytes: int
) -> MappedBlock:
    """Read a block's mapped-ram header and skip past the block's pages.

    Raises:
        DataError: truncated, malformed, or the source cannot seek.
    """
    if not source.seekable():
        raise DataError(
            "this is a mapped-ram stream, which needs a file that can be sought in",
            remedy="give the file itself, not a pipe",
            offset_bytes=source.offset,
        )
    start = source.offset
    file_start = source.file_position()
    version = source.u32("a mapped-ram header")
    header_page_bytes = source.u64("a mapped-ram header")
    bitmap_offset = source.u64("a mapped-ram header")
    pages_offset = source.u64("a mapped-ram header")
    if version != HEADER_VERSION or header_page_bytes != page_bytes:
        raise DataError(
            "a mapped-ram header is malformed",
            why=f"version {version}, pages of {header_page_bytes} bytes",
            offset_bytes=start,
        )
    if bitmap_offset == 0 and pages_offset == 0:
        return MappedBlock(0, 0, used_length_bytes)
    bitmap_end = bitmap_offset + bitmap_bytes(used_length_bytes // page_bytes)
    if (
        bitmap_offset != file_start + HEADER_BYTES
        or pages_offset < bitmap_end
        or pages_offset % page_bytes
        or pages_offset > _FILE_LIMIT_BYTES
    ):
        raise DataError(
            "a mapped-ram header points to an impossible place",
            why=f"bitmap at {bitmap_offset}, pages at {pages_offset}",
            offset_bytes=start,
        )
    end = pages_offset + used_length_bytes
    source.seek(end, stream_offset=start + (end - file_start))
    return MappedBlock(bitmap_offset, pages_offset, used_length_bytes)


def bitmap_bytes(pages: int) -> int:
    """Return the size of a bitmap: whole 64-bit words."""
    return -(-pages // 64) * 8


def read_mapped_pages(
    source: StreamSource, block_index: int, block: MappedBlock, page_bytes: int
) -> Iterator[Pages | ZeroRun]:
    """Yield the block's pages in address order; the source's position is lost.

    A page without its bit is zero, or keeps the loading machine's own content; QEMU does not tell
    the two apart.

    Raises:
        DataError: the file ends before the bitmap or a page.
    """
    pages = block.used_length_bytes // page_bytes
    for first in range(0, pages, _BITMAP_CHUNK_BYTES * 8):
        count = min(_BITMAP_CHUNK_BYTES * 8, pages - first)
        size = bitmap_bytes(count)
        place = block.bitmap_offset + first // 8
        source.seek(place, stream_offset=place)
        bitmap = int.from_bytes(source.take(size, "a mapped-ram bitmap"), "little")
        bits = f"{bitmap:0{size * 8}b}"[::-1][:count]
        for match in _RUN.finditer(bits):
            start = (first + match.start()) * page_bytes
            length = (match.end() - match.start()) * page_bytes
            if match[0][0] == "0":
                yield ZeroRun(block_index, start, length // page_bytes)
                continue
            source.seek(block.pages_offset + start, stream_offset=block.pages_offset + start)
            for part in range(start, start + length, _RUN_LIMIT_BYTES):
                part_bytes = min(_RUN_LIMIT_BYTES, start + length - part)
                yield Pages(block_index, part, source.take(part_bytes, "mapped RAM pages"))
