"""The index's encoding: ``docs/reference/file-format.md``, "Index". All integers little-endian."""

from __future__ import annotations

import struct
import sys
from array import array
from typing import Final

from stillframe.errors import DataError
from stillframe.still.frames import LEVEL_DEFAULT, LEVEL_NONE, compress_table, decompress_table
from stillframe.still.index import DIGEST_BYTES, BlockEntry, Columns, Index

INDEX_MAGIC: Final = b"STILLIDX"
INDEX_VERSION: Final = 1

_HEADER = struct.Struct("<8sHHIIIQQ")
_BLOCK = struct.Struct("<QQH")
_FRAME_BYTES = 4 + 4 + DIGEST_BYTES
_RUN_BYTES = 8 + 4 + 4 + 4 + 1
_TABLES_MAX_BYTES = 1 << 30
_TABLES_MAX_RATIO = 256
"""Tables compress by 5 to 40; readers refuse a higher ratio, against decompression bombs."""
_BLOCKS_MAX = 1 << 16
_FRAMES_MAX = (1 << 27) - 4  # zstd's seek table has room for 2**27 frames; up to four are ours


def encode_index(index: Index) -> bytes:
    """Encode the index for the file."""
    c = index.columns
    parts = [
        _BLOCK.pack(b.used_length_bytes, b.end_run - b.first_run, len(name)) + name
        for b in index.blocks
        for name in (b.idstr.encode(),)
    ]
    frames = [index.frame(number) for number in range(index.frame_count)]
    parts.append(_little_endian(array("I", [f.raw_bytes for f in frames])))
    parts.append(_little_endian(array("I", [f.stored_bytes for f in frames])))
    parts.extend(f.digest for f in frames)
    parts.extend(map(_little_endian, c))
    tables = b"".join(parts)
    header = _HEADER.pack(
        INDEX_MAGIC,
        INDEX_VERSION,
        0,
        index.target_page_bytes,
        len(index.blocks),
        index.frame_count,
        index.run_count,
        len(tables),
    )
    packed = compress_table(tables, LEVEL_DEFAULT)
    if len(tables) > _TABLES_MAX_RATIO * len(packed):
        packed = compress_table(tables, LEVEL_NONE)
    return header + packed


def decode_index(content: bytes) -> Index:
    """Decode and check an index.

    Raises:
        DataError: damaged, hostile, or of an unknown version.
    """
    if len(content) < _HEADER.size:
        raise DataError("the index is too short")
    magic, version, flags, page_bytes, blocks, frames, runs, tables_bytes = _HEADER.unpack_from(
        content
    )
    if magic != INDEX_MAGIC:
        raise DataError("the index does not start with its magic")
    if version != INDEX_VERSION or flags:
        raise DataError(
            f"the index has version {version} (flags {flags:#x}), only {INDEX_VERSION} is known",
            remedy="read it with a newer Stillframe",
        )
    if not 512 <= page_bytes <= 1 << 20 or page_bytes & (page_bytes - 1):
        raise DataError(f"the index has an odd target page size of {page_bytes} bytes")
    fixed_bytes = frames * _FRAME_BYTES + runs * _RUN_BYTES
    names_max_bytes = blocks * (_BLOCK.size + 255)
    if (
        blocks > _BLOCKS_MAX
        or frames > _FRAMES_MAX
        or tables_bytes > min(_TABLES_MAX_BYTES, _TABLES_MAX_RATIO * len(content))
        or not fixed_bytes <= tables_bytes <= fixed_bytes + names_max_bytes
    ):
        raise DataError("the index's counts do not agree with its length")
    tables = decompress_table(memoryview(content)[_HEADER.size :], tables_bytes)
    entries, start = _decode_blocks(tables, blocks, runs)
    if start + fixed_bytes != tables_bytes:
        raise DataError("the index's tables have the wrong length")
    cursor = _Cursor(tables, start)
    raw_bytes, stored_bytes = cursor.take("I", frames), cursor.take("I", frames)
    digests = cursor.take("B", frames * DIGEST_BYTES).tobytes()
    columns = Columns(*(cursor.take(code, runs) for code in "QIIIB"))
    return Index(
        target_page_bytes=page_bytes,
        blocks=entries,
        raw_bytes=raw_bytes,
        stored_bytes=stored_bytes,
        digests=digests,
        columns=columns,
    )


def _decode_blocks(tables: bytes, blocks: int, runs: int) -> tuple[list[BlockEntry], int]:
    """Return the block entries, and where the next table starts."""
    entries: list[BlockEntry] = []
    position = first_run = 0
    for _ in range(blocks):
        if position + _BLOCK.size > len(tables):
            raise DataError("the index's block table is truncated")
        used_length_bytes, block_runs, name_bytes = _BLOCK.unpack_from(tables, position)
        position += _BLOCK.size
        name = tables[position : position + name_bytes]
        position += name_bytes
        if not 1 <= name_bytes <= 255 or len(name) != name_bytes or not name.isascii():
            raise DataError("the index names a block in an odd way")
        entries.append(
            BlockEntry(name.decode("ascii"), used_length_bytes, first_run, first_run + block_runs)
        )
        first_run += block_runs
    if first_run != runs:
        raise DataError("the index's blocks do not add up to its runs")
    if len({entry.idstr for entry in entries}) != len(entries):
        raise DataError("the index names a block twice")
    return entries, position


class _Cursor:
    """Reader of consecutive columns of a table."""

    def __init__(self, tables: bytes, position: int) -> None:
        self._tables = memoryview(tables)
        self._position = position

    def take(self, code: str, count: int) -> array[int]:
        column = array(code)
        end = self._position + count * column.itemsize
        column.frombytes(self._tables[self._position : end])
        self._position = end
        if sys.byteorder == "big":
            column.byteswap()
        return column


def _little_endian(column: array[int]) -> bytes:
    if sys.byteorder == "big":
        column = array(column.typecode, column)
        column.byteswap()
    return column.tobytes()
