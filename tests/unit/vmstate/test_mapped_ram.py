"""Mapped-ram files (QEMU 9.0 and later), built by hand: no such QEMU is needed."""

from __future__ import annotations

import io
from struct import pack

import pytest

from stillframe.errors import DataError
from stillframe.vmstate.reader import StreamReader
from stillframe.vmstate.records import Pages, ZeroRun
from tests.support import stream_build as sb
from tests.support.stream_build import PAGE, Pipe, word

MIB = 1 << 20


def mapped_file(
    blocks: dict[str, dict[int, bytes]],
    pages: dict[str, int],
    *,
    begin: int = 0,
    ignored: tuple[str, ...] = (),
) -> bytes:
    """A file with these pages by block and page number; the stream starts at ``begin``."""
    names = ["mapped-ram"] + (["x-ignore-shared"] if ignored else [])
    out = bytearray(begin)
    out += sb.configuration("pc-q35-9.0", sb.capabilities(*names))
    out += b"\x01" + pack(">I", 2) + sb.name("ram") + pack(">II", 0, 4)
    out += word(sum(pages.values()) * PAGE, 4)
    for idstr, content in blocks.items():
        count = pages[idstr]
        out += sb.name(idstr) + pack(">Q", count * PAGE)
        if ignored:
            out += pack(">Q", 0)
        if idstr in ignored:
            out += pack(">IQQQ", 1, PAGE, 0, 0)
            continue
        bitmap = bytearray(-(-count // 64) * 8)
        for number in content:
            bitmap[number // 8] |= 1 << number % 8
        place = len(out) + 28
        pages_place = -(-(place + len(bitmap)) // MIB) * MIB
        out += pack(">IQQQ", 1, PAGE, place, pages_place) + bitmap
        out += bytes(pages_place - len(out))
        ram = bytearray(b"?" * count * PAGE)
        for number, page in content.items():
            ram[number * PAGE : (number + 1) * PAGE] = page
        out += ram
    out += word(0, 0x10) + b"\x7e" + pack(">I", 2)
    out += sb.part(b"", kind=3)
    return bytes(out + sb.tail((sb.device(4, "cpu", b"c"),)))


A, B, C = b"A" * PAGE, b"B" * PAGE, b"C" * PAGE
CONTENT = {"ram0": {0: A, 1: B, 9: C}, "rom": {63: A, 64: B}}
COUNTS = {"ram0": 10, "rom": 65}


@pytest.mark.parametrize("begin", [0, 4096])
def test_pages_are_read_from_their_places(begin: int) -> None:
    file = io.BytesIO(mapped_file(CONTENT, COUNTS, begin=begin))
    file.seek(begin)
    events = list(StreamReader(file).events())
    assert [e for e in events if isinstance(e, Pages | ZeroRun)] == [
        Pages(0, 0, A + B),
        ZeroRun(0, 2 * PAGE, 7),
        Pages(0, 9 * PAGE, C),
        ZeroRun(1, 0, 63),
        Pages(1, 63 * PAGE, A + B),
    ]
    assert len(events) > 6


def test_ignored_blocks_have_no_place() -> None:
    data = mapped_file(CONTENT, COUNTS, ignored=("ram0",))
    events = sb.read(data)
    assert {e.block_index for e in events if isinstance(e, Pages | ZeroRun)} == {1}


def test_bitmap_of_more_than_one_chunk() -> None:
    count = (1 << 18) + 70
    content = {0: A, (1 << 18) - 1: B, 1 << 18: C, count - 1: A}
    pages = bytearray(mapped_file({"big": {}}, {"big": 64}))
    # Only the header is made large: pages and bitmap are a sparse file's.
    place = pages.index(pack(">IQ", 1, PAGE))
    bitmap = bytearray(-(-count // 64) * 8)
    for number in content:
        bitmap[number // 8] |= 1 << number % 8

    class Sparse(io.BytesIO):
        """Pages far beyond the real file, by their number."""

        def __init__(self, data: bytes) -> None:
            super().__init__(data)
            self.place = 0

        def seek(self, offset: int, whence: int = 0, /) -> int:
            self.place = offset
            return offset

        def tell(self) -> int:
            return self.place

        def read(self, size: int | None = -1, /) -> bytes:
            if self.place >= MIB:
                number = (self.place - MIB) // PAGE
                if number >= count:
                    rest = end[self.place - MIB - count * PAGE :][:size]
                    self.place += len(rest)
                    return rest
                self.place += PAGE
                return content.get(number, b"?" * PAGE)
            data = self.getvalue()[self.place : self.place + (size or 0)]
            self.place += len(data)
            return data

    head = bytes(pages[: place - 8]) + pack(">Q", count * PAGE)
    head = head.replace(word(64 * PAGE, 4), word(count * PAGE, 4))
    head += pack(">IQQQ", 1, PAGE, len(head) + 28, MIB) + bitmap
    end = word(0, 0x10) + b"\x7e" + pack(">I", 2) + sb.part(b"", kind=3) + sb.tail(())
    runs = [e for e in StreamReader(Sparse(head)).events() if isinstance(e, Pages)]
    assert [(r.offset_bytes // PAGE, r.data) for r in runs] == [
        (0, A),
        ((1 << 18) - 1, B),
        (1 << 18, C),
        (count - 1, A),
    ]


def test_pipe_is_refused() -> None:
    with pytest.raises(DataError, match="mapped-ram stream, which needs a file"):
        list(StreamReader(Pipe(mapped_file(CONTENT, COUNTS))).events())


def test_truncated_pages() -> None:
    data = mapped_file({"ram0": {9: A}}, {"ram0": 10})
    for size in (MIB + 9 * PAGE + 5, MIB, 300, 200):
        with pytest.raises(DataError):
            sb.read(data[:size])


@pytest.mark.parametrize(
    ("at", "new"),
    [
        (0, pack(">I", 2)),
        (4, pack(">Q", 2 * PAGE)),
        (12, pack(">Q", 0x77)),
        (12, pack(">Q", 0)),
        (20, pack(">Q", MIB + 1)),
        (20, pack(">Q", 0)),
        (20, pack(">Q", 1 << 63)),
    ],
)
def test_malformed_header(at: int, new: bytes) -> None:
    data = mapped_file({"ram0": {9: A}}, {"ram0": 10})
    place = data.index(pack(">IQ", 1, PAGE)) + at
    with pytest.raises(DataError, match="mapped-ram header"):
        sb.read(data[:place] + new + data[place + len(new) :])
