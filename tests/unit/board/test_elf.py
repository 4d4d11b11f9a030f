"""The ELF loader: takes guests, and refuses what is none."""

from __future__ import annotations

import struct
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from stillframe.board.hardware.elf import parse_guest, read_guest
from stillframe.errors import DataError, NotFoundError
from tests.unit.board.tiny import compile_guest

END_GPA = 8 << 20
HEADER = struct.Struct("<16sHHIQQQIHHHHHH")
SEGMENT = struct.Struct("<IIQQQQQQ")
CODE = b"\xf4\xeb\xfd" * 20


def elf(
    segments: list[tuple[int, int, int, int, int]] | None = None,
    *,
    ident: bytes = b"\x7fELF\x02\x01\x01",
    kind: int = 2,
    machine: int = 62,
    entry: int = 0x100000,
    entry_bytes: int = 56,
    entries: int | None = None,
    table_at: int = 64,
) -> bytes:
    """A file with segments (type, offset, address, bytes in the file, bytes in memory)."""
    if segments is None:
        segments = [(1, 64 + 56, 0x100000, len(CODE), 0x1000)]
    count = len(segments) if entries is None else entries
    header = HEADER.pack(
        ident, kind, machine, 1, entry, table_at, 0, 0, 64, entry_bytes, count, 0, 0, 0
    )
    table = b"".join(
        SEGMENT.pack(type_, 5, offset, gpa, gpa, file_bytes, memory_bytes, 1)
        for type_, offset, gpa, file_bytes, memory_bytes in segments
    )
    return header + table + CODE


def test_a_guest() -> None:
    guest = parse_guest(elf(), end_gpa=END_GPA)
    assert guest.entry == 0x100000
    [segment] = guest.segments
    assert (segment.gpa, segment.memory_bytes, segment.data) == (0x100000, 0x1000, CODE)


def test_what_a_compiler_makes() -> None:
    path = compile_guest("char zeroes[5000]; void _start(void) { zeroes[1]++; halt(); }")
    guest = read_guest(path, end_gpa=END_GPA)
    assert sum(segment.memory_bytes for segment in guest.segments) > 5000


@pytest.mark.parametrize(
    ("data", "words"),
    [
        (b"", "no ELF"),
        (b"\x7fELF", "no ELF"),
        (b"#!/bin/sh\n" * 20, "no ELF"),
        (elf(ident=b"\x7fELF\x01\x01\x01"), "64-bit"),
        (elf(ident=b"\x7fELF\x02\x02\x01"), "little-endian"),
        (elf(ident=b"\x7fELF\x02\x01\x02"), "unknown version"),
        (elf(kind=3), "no executable at fixed addresses.*-no-pie"),
        (elf(kind=1), "no executable"),
        (elf(machine=183), "another processor .*183"),
        (elf(entry_bytes=55), "make no sense"),
        (elf(entries=0), "make no sense"),
        (elf(entries=65535), "make no sense"),
        (elf(table_at=1 << 63), "beyond its end"),
        (elf(entries=60), "beyond its end"),
        (elf([]), "make no sense"),
        (elf([(4, 0, 0, 0, 0)]), "nothing to load"),
        (elf([(2, 0, 0, 0, 0)]), "dynamically"),
        (elf([(3, 0, 0, 0, 0)]), "dynamically"),
        (elf([(1, 64, 0x100000, 20, 10)]), "longer in the file"),
        (elf([(1, 1 << 60, 0x100000, 20, 20)]), "beyond the file"),
        (elf([(1, 0, 0xFF000, 20, 20)]), "too low"),
        (elf([(1, 0, 0x100000, 20, END_GPA)]), "does not fit.*more RAM"),
        (elf([(1, 0, (1 << 64) - 4096, 20, 4096)]), "does not fit"),
        (elf([(1, 0, 0x100000, 9, 9), (1, 0, 0x100008, 9, 9)]), "overlap at 0x100008"),
        (elf(entry=0x101000), "entry point 0x101000"),
    ],
)
def test_what_is_no_guest(data: bytes, words: str) -> None:
    with pytest.raises(DataError, match=words) as raised:
        parse_guest(data, end_gpa=END_GPA)
    assert "\n" not in str(raised.value)


def test_files(tmp_path: Path) -> None:
    with pytest.raises(NotFoundError, match="there is no guest"):
        read_guest(str(tmp_path / "none"), end_gpa=END_GPA)
    path = tmp_path / "text"
    path.write_text("text")
    with pytest.raises(DataError, match=f"{path}: it is no ELF file"):
        read_guest(str(path), end_gpa=END_GPA)


@settings(max_examples=300, deadline=None)
@given(st.data())
def test_damaged_files_never_raise_anything_else(data: st.DataObject) -> None:
    file = bytearray(elf([(1, 176, 0x100000, 9, 9), (1, 176, 0x200000, 9, 99)]))
    for _ in range(data.draw(st.integers(1, 6))):
        place = data.draw(st.integers(0, 176 - 1))
        file[place] = data.draw(st.integers(0, 255))
    del file[data.draw(st.integers(0, len(file))) :]
    try:
        guest = parse_guest(bytes(file), end_gpa=END_GPA)
    except DataError:
        return
    for segment in guest.segments:
        assert segment.gpa >= 0x100000
        assert len(segment.data) <= segment.memory_bytes
        assert segment.gpa + segment.memory_bytes <= END_GPA
