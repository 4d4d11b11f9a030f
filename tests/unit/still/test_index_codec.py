"""The index as bytes: headers that lie, tables that explode."""

from __future__ import annotations

import struct
import tracemalloc
from array import array
from collections.abc import Mapping
from types import MappingProxyType

import pytest

from stillframe.errors import DataError
from stillframe.still.frames import compress_table
from stillframe.still.index import BlockEntry, Index, empty_columns
from stillframe.still.index_codec import decode_index, encode_index

HEADER = struct.Struct("<8sHHIIIQQ")
NONE: Mapping[str, object] = MappingProxyType({})
GOOD = (b"STILLIDX", 1, 0, 4096, 0, 0, 0, 0)


def content(tables: bytes = b"", fields: Mapping[str, object] = NONE) -> bytes:
    names = ("magic", "version", "flags", "page", "blocks", "frames", "runs", "tables")
    values = dict(zip(names, GOOD, strict=True)) | {"tables": len(tables)} | dict(fields)
    return HEADER.pack(*values.values()) + compress_table(tables, 1)


def test_an_empty_index() -> None:
    index = decode_index(content())
    assert (index.frame_count, index.run_count, index.stream_bytes) == (0, 0, 0)
    assert index.runs_of_frame(0) == []


@pytest.mark.parametrize(
    "fields",
    [
        {"magic": b"STILLIDY"},
        {"version": 0},
        {"version": 2},
        {"flags": 1},
        {"page": 0},
        {"page": 4095},
        {"page": 256},
        {"page": 1 << 31},
        {"blocks": 1},
        {"blocks": 0xFFFFFFFF, "tables": 100},
        {"frames": 1},
        {"frames": 0xFFFFFFFF},
        {"runs": 1},
        {"runs": (1 << 64) - 1},
        {"tables": 1},
        {"tables": (1 << 64) - 1},
        {"runs": 100_000_000, "tables": 2_100_000_000},
        {"frames": 26_000_000, "tables": 40 * 26_000_000},
    ],
)
def test_headers_that_lie(fields: dict[str, object]) -> None:
    tracemalloc.start()
    try:
        with pytest.raises(DataError):
            decode_index(content(fields=fields))
        assert tracemalloc.get_traced_memory()[1] < 8 << 20
    finally:
        tracemalloc.stop()


def test_tables_that_explode() -> None:
    frames = 2_000_000
    bomb = content(bytes(40 * frames), {"frames": frames})
    assert len(bomb) < 50_000
    tracemalloc.start()
    try:
        with pytest.raises(DataError, match="counts do not agree"):
            decode_index(bomb)
        assert tracemalloc.get_traced_memory()[1] < 8 << 20
    finally:
        tracemalloc.stop()


def test_tables_that_compress_too_well_are_stored_plainly() -> None:
    """So that no file that we write looks like a bomb."""
    frames = 100_000
    index = Index(
        target_page_bytes=4096,
        blocks=(),
        raw_bytes=array("I", (5,)) * frames,
        stored_bytes=array("I", (7,)) * frames,
        digests=bytes(32 * frames),
        columns=empty_columns(),
    )
    again = decode_index(encode_index(index))
    assert (again.frame_count, again.stream_bytes, again.stored_bytes) == (
        frames,
        5 * frames,
        7 * frames,
    )


def entry(name: bytes, length: int = 4096, runs: int = 0) -> bytes:
    return struct.pack("<QQH", length, runs, len(name)) + name


@pytest.mark.parametrize(
    ("tables", "blocks"),
    [
        (entry(b""), 1),
        (entry(b"x" * 256), 1),
        (entry("é".encode()), 1),
        (entry(b"a") + entry(b"a"), 2),
        (entry(b"a", runs=1), 1),
        (entry(b"a")[:-1], 1),
        (entry(b"a")[:10], 1),
        (entry(b"a") + b"more", 1),
    ],
)
def test_blocks_that_are_odd(tables: bytes, blocks: int) -> None:
    with pytest.raises(DataError):
        decode_index(content(tables, {"blocks": blocks}))


def test_blocks_without_runs() -> None:
    index = decode_index(content(entry(b"a") + entry(b"b"), {"blocks": 2}))
    assert index.blocks == (BlockEntry("a", 4096, 0, 0), BlockEntry("b", 4096, 0, 0))
    assert index.lookup(1, 0) is None


@pytest.mark.parametrize("length", [0, 1, 39])
def test_too_short(length: int) -> None:
    with pytest.raises(DataError, match="too short"):
        decode_index(content()[:length])
