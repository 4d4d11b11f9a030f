"""Reads a file with nothing but docs/reference/file-format.md: its byte offsets must hold."""

from __future__ import annotations

import json
import struct

from blake3 import blake3

from stillframe.store.frames import decompress_frame, decompress_table
from tests.support_store.small import BLOCKS, PAGE, open_bytes, random_ram, small_file


def u(content: bytes, offset: int, size: int) -> int:
    return int.from_bytes(content[offset : offset + size], "little")


def test_the_documented_offsets() -> None:
    seed = 4
    content = small_file(seed, shuffled=True)
    ram = random_ram(seed)

    entries = u(content, len(content) - 9, 4)
    seek_table = len(content) - (8 + 8 * entries + 9)
    trailer = content[seek_table - 136 : seek_table]
    assert trailer[:8] == bytes.fromhex("522a4d18") + (128).to_bytes(4, "little")
    assert trailer[8:24] == b"STILLTRL" + struct.pack("<HHI", 1, 0, 0)
    assert trailer[120:] == blake3(trailer[8:120]).digest()[:16]
    index = content[u(trailer, 24, 8) :][: u(trailer, 32, 8)]
    manifest = content[u(trailer, 40, 8) :][: u(trailer, 48, 8)]
    assert trailer[56:88] == blake3(index).digest()
    assert trailer[88:120] == blake3(manifest).digest()
    digests = blake3(index).digest() + blake3(manifest).digest()
    assert open_bytes(content).id == blake3(digests).hexdigest()

    assert json.loads(manifest)["blocks"][0]["idstr"] == "pc.ram"
    assert index[:16] == b"STILLIDX" + struct.pack("<HHI", 1, 0, PAGE)
    blocks, frames, runs = u(index, 16, 4), u(index, 20, 4), u(index, 24, 8)
    tables = decompress_table(index[40:], u(index, 32, 8))

    position = 0
    rows_of: list[tuple[str, int]] = []
    for _ in range(blocks):
        length, count, name_bytes = struct.unpack_from("<QQH", tables, position)
        name = tables[position + 18 : position + 18 + name_bytes].decode("ascii")
        assert dict(BLOCKS)[name] == length
        rows_of.append((name, count))
        position += 18 + name_bytes

    def column(code: str, count: int) -> tuple[int, ...]:
        nonlocal position
        values = struct.unpack_from(f"<{count}{code}", tables, position)
        position += struct.calcsize(f"<{count}{code}")
        return values

    raw_bytes, stored_bytes = column("I", frames), column("I", frames)
    frame_digests = [bytes(column("B", 32)) for _ in range(frames)]
    first_page, pages, frame_of = column("Q", runs), column("I", runs), column("I", runs)
    raw_offset, kind = column("I", runs), column("B", runs)
    assert position == len(tables)

    raws: list[bytes] = []
    place = 0
    for number in range(frames):
        stored = content[place : place + stored_bytes[number]]
        assert blake3(stored).digest() == frame_digests[number]
        raws.append(decompress_frame(stored, raw_bytes[number]))
        place += stored_bytes[number]
    assert content[place : place + 4] == bytes.fromhex("502a4d18")

    found: dict[tuple[int, int], bytes | None] = {}
    row = 0
    for block, (name, count) in enumerate(rows_of):
        for _ in range(count):
            raw, start = raws[frame_of[row]], raw_offset[row]
            named = not int.from_bytes(raw[start : start + 8], "big") & 0x20
            start += 8 + (1 + len(name) if named else 0)
            for k in range(pages[row]):
                if kind[row]:
                    at = start + k * (8 + PAGE)
                    found[block, first_page[row] + k] = raw[at : at + PAGE]
                else:
                    assert raw[start + k * 9] == 0
                    found[block, first_page[row] + k] = None
            row += 1
    assert found == ram
