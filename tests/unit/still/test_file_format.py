"""Reads a file with nothing but docs/reference/file-format.md: its byte offsets must hold."""

from __future__ import annotations

import json
import struct

from blake3 import blake3
from cryptography.hazmat.primitives.ciphers.aead import AESGCM
from cryptography.hazmat.primitives.hashes import SHA256
from cryptography.hazmat.primitives.kdf.hkdf import HKDF

from stillframe.still.frames import decompress_frame, decompress_table, zstd
from tests.support_store.sealed import KEY, open_sealed, sealed_file
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


def test_an_encrypted_file() -> None:
    """Index, manifest and each frame, opened as the page says, with nothing of ours."""
    content = sealed_file(4)
    trailer = content[content.index(b"STILLTRL") - 8 :][:136]
    assert u(trailer, 18, 2) == 1
    index_at, manifest_at = u(trailer, 24, 8), u(trailer, 40, 8)
    seal = content[index_at - 8 - u(trailer, 20, 4) : index_at - 8]
    assert seal[:4] == bytes.fromhex("532a4d18")
    seal = seal[8:]
    slots_bytes = u(seal, 60, 4)
    assert seal[:12] == b"STILLSEA" + struct.pack("<HH", 1, 1)
    assert seal[12:28] == KEY.id
    assert seal[64 : 64 + slots_bytes] == KEY.slots

    info = b"stillframe file\0" + blake3(seal[:-32]).digest()
    derived = HKDF(SHA256(), 64, seal[28:60], info).derive(KEY.secret)
    assert derived[32:] == seal[64 + slots_bytes :]
    cipher = AESGCM(derived[:32])

    def opened(kind: int, number: int, sealed: bytes) -> bytes:
        nonce = struct.pack(">IQ", kind, number)
        return cipher.decrypt(nonce, sealed, nonce)

    index = opened(2, 0, content[index_at:][: u(trailer, 32, 8)])
    manifest = opened(3, 0, content[manifest_at:][: u(trailer, 48, 8)])
    assert index[:8] == b"STILLIDX"
    assert json.loads(manifest)["blocks"][0]["idstr"] == "pc.ram"
    place = 0
    stream = b""
    while content[place : place + 4] == bytes.fromhex("542a4d18"):
        length = u(content, place + 4, 4)
        frame = opened(1, u(content, place + 8, 8), content[place + 16 : place + 8 + length])
        stream += zstd.decompress(frame)
        place += 8 + length
    assert content[place : place + 4] == bytes.fromhex("532a4d18")
    assert stream == b"".join(open_sealed(content).iter_stream())
