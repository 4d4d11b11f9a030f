"""The picture of a snapshot's RAM, read back pixel by pixel."""

from __future__ import annotations

import struct
import zlib

import pytest

from stillframe.errors import DataError
from stillframe.model import GpaRange
from stillframe.still import page_origins, ram_map
from stillframe.still.index_builder import PACKED_RUN
from stillframe.still.page_classes import DATA, ZERO
from stillframe.still.page_origins import FAULT, NEVER, PageOrigins
from stillframe.still.ram_map import (
    BY_FAULT,
    COLOURS,
    UNCHANGED,
    UNPOPULATED,
    RamMap,
    draw_ram,
)
from tests.support_store.chains import MadeChain, Ram
from tests.support_store.small import BLOCKS, PAGE, open_bytes, random_ram, small_file

WHITE = (255, 255, 255)


def pixels(drawn: RamMap) -> list[tuple[int, ...]]:
    """As any reader of PNG has them."""
    assert drawn.png[:8] == b"\x89PNG\r\n\x1a\n"
    at, data = 8, b""
    while at < len(drawn.png):
        length, kind = struct.unpack_from(">I4s", drawn.png, at)
        content = drawn.png[at + 8 : at + 8 + length]
        assert struct.unpack_from(">I", drawn.png, at + 8 + length) == (zlib.crc32(kind + content),)
        if kind == b"IHDR":
            assert struct.unpack(">IIBBBBB", content) == (drawn.width, drawn.height, 8, 2, 0, 0, 0)
        data += content if kind == b"IDAT" else b""
        at += 12 + length
    raw = zlib.decompress(data)
    row = 1 + 3 * drawn.width
    assert len(raw) == drawn.height * row
    return [
        tuple(raw[start + 1 + 3 * x :][:3])
        for start in range(0, len(raw), row)
        for x in range(drawn.width)
    ]


def test_each_page_has_its_colour_at_its_address() -> None:
    chain, ram = MadeChain(), random_ram(5)
    changes: Ram = {(0, 3): b"x" * PAGE, (0, 40): None}
    ranges = (
        GpaRange(gpa=0x10000, length_bytes=48 * PAGE, idstr="pc.ram", offset_bytes=16 * PAGE),
        GpaRange(gpa=0, length_bytes=16 * PAGE, idstr="pc.ram", offset_bytes=0),
        GpaRange(gpa=1 << 32, length_bytes=3 * PAGE, idstr="pc.bios", offset_bytes=0),
    )
    chain.add(ram)
    chain.add(changes, memory_map=ranges)
    with chain.open() as snapshot:
        drawn = draw_ram(snapshot)
    seen = pixels(drawn)

    def colour(place: tuple[int, int]) -> tuple[int, ...]:
        if (ram | changes)[place] is None:
            return COLOURS[ZERO]
        return COLOURS[DATA if place in changes else UNCHANGED]

    assert seen[:16] == [colour((0, page)) for page in range(16)]
    assert seen[16:512] == [WHITE] * 496
    assert seen[512 : 512 + 48] == [colour((0, page)) for page in range(16, 64)]
    assert seen[1024:1536] == [WHITE] * 512  # a gap
    assert seen[1536:1539] == [colour((2, page)) for page in range(3)]
    assert [(row, part.gpa) for row, part in drawn.parts] == [(0, 0), (1, 0x10000), (3, 1 << 32)]
    assert sum(drawn.pages.values()) == 67
    assert drawn.pages["data"] == 1


def test_without_a_memory_map_the_blocks_follow_each_other() -> None:
    with open_bytes(small_file()) as snapshot:
        drawn = draw_ram(snapshot)
        total = sum(map(sum, (snapshot.index.page_counts(n) for n in range(3))))
    assert [part.idstr for _, part in drawn.parts] == [name for name, _ in BLOCKS]
    assert drawn.pages["data"] + drawn.pages["zero"] == total
    assert drawn.pages["unchanged"] == 0


def test_large_ones_have_several_pages_in_a_pixel(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ram_map, "_WIDTH", 8)
    monkeypatch.setattr(ram_map, "_MOST_ROWS", 3)
    with open_bytes(small_file()) as snapshot:
        drawn = draw_ram(snapshot)
        content = dict(snapshot.iter_pages("pc.ram"))
    assert drawn.pages_per_pixel == 4
    seen = pixels(drawn)
    for pixel in range(16):
        kinds = [content[page] for page in range(4 * pixel, 4 * pixel + 4)]
        assert seen[pixel] == COLOURS[DATA if any(kinds) else ZERO]


def test_what_was_never_populated_and_what_a_fault_saved() -> None:
    ram = random_ram(5)
    origins = PageOrigins([length // PAGE for _, length in BLOCKS])
    zero, data = (
        next(p for p in range(64) if (ram[0, p] is None) is gone) for gone in (True, False)
    )
    for page, kind in ((zero, NEVER), (data, FAULT)):
        origins.add(PACKED_RUN.pack(0, 1, page, kind, 0))
    chain = MadeChain()
    chain.add(ram, page_origins=origins.encode())
    with chain.open() as snapshot:
        drawn = draw_ram(snapshot)
    seen = pixels(drawn)
    assert seen[zero] == COLOURS[UNPOPULATED]
    assert seen[data] == COLOURS[BY_FAULT]
    assert (drawn.pages["never_populated"], drawn.pages["saved_by_fault"]) == (1, 1)


@pytest.mark.parametrize("text", ["?", "AAAA"])
def test_origins_that_lie_are_refused(text: str) -> None:
    chain = MadeChain()
    chain.add(random_ram(5), page_origins=text)
    with chain.open() as snapshot, pytest.raises(DataError):
        draw_ram(snapshot)


def test_of_very_much_ram_nothing_is_recorded(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(page_origins, "_MOST_PAGES", 7)
    for pages, is_recorded in ((7, True), (8, False)):
        origins = PageOrigins([pages])
        origins.add(PACKED_RUN.pack(0, 2, 5, NEVER, 0))
        assert bool(origins.encode()) == is_recorded
