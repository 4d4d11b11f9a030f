"""The end of the file: trailers and seek tables that lie."""

from __future__ import annotations

import struct

import pytest

from stillframe.errors import DataError
from stillframe.still.frames import digest_of, skippable_frame
from stillframe.still.trailer import (
    SEEK_FOOTER,
    TRAILER_FRAME_BYTES,
    TRAILER_FRAME_MAGIC,
    Trailer,
    decode_trailer,
    encode_trailer,
    seek_table_bytes,
    trailer_of,
)
from tests.support_store.small import open_bytes, small_file
from tests.support_store.tamper import Parts

GOOD = trailer_of(b"i" * 100, b"m" * 50, 1000)
PLACE = 1000 + 8 + 100 + 8 + 50


def test_round_trip() -> None:
    frame = encode_trailer(GOOD)
    assert len(frame) == TRAILER_FRAME_BYTES
    assert decode_trailer(frame, PLACE) == GOOD
    assert GOOD.snapshot_id == digest_of(GOOD.index_digest, GOOD.manifest_digest).hex()


@pytest.mark.parametrize(
    "change",
    [
        {"index_offset": 0},
        {"index_offset": 1007},
        {"index_bytes": 101},
        {"index_bytes": 1 << 63},
        {"manifest_offset": 1},
        {"manifest_bytes": 51},
        {"manifest_bytes": (1 << 64) - 1},
    ],
)
def test_a_trailer_that_points_elsewhere(change: dict[str, int]) -> None:
    frame = encode_trailer(Trailer(**(GOOD._asdict() | change)))
    with pytest.raises(DataError, match="wrong places"):
        decode_trailer(frame, PLACE)


def test_a_trailer_at_another_place() -> None:
    with pytest.raises(DataError, match="wrong places"):
        decode_trailer(encode_trailer(GOOD), PLACE + 1)


def test_every_byte_of_a_trailer_counts() -> None:
    frame = encode_trailer(GOOD)
    for place in range(len(frame)):
        changed = bytearray(frame)
        changed[place] ^= 0x80
        with pytest.raises(DataError):
            decode_trailer(bytes(changed), PLACE)


def test_a_newer_version() -> None:
    content = bytearray(encode_trailer(GOOD)[8:-16])
    content[8] = 2
    frame = skippable_frame(TRAILER_FRAME_MAGIC, bytes(content) + digest_of(content)[:16])
    with pytest.raises(DataError, match="newer Stillframe"):
        decode_trailer(frame, PLACE)


@pytest.mark.parametrize("frame", [b"", b"x" * TRAILER_FRAME_BYTES, encode_trailer(GOOD)[:-1]])
def test_no_trailer(frame: bytes) -> None:
    with pytest.raises(DataError, match="no trailer"):
        decode_trailer(frame, PLACE)


@pytest.mark.parametrize(
    ("frames", "descriptor", "magic", "complaint"),
    [
        (10, 0, 0x8F92EAB2, "does not end"),
        (0xFFFFFFFF, 0, 0x8F92EAB1, "seek table"),
        (10, 0x80, 0x8F92EAB1, "seek table"),
        (10, 1, 0x8F92EAB1, "seek table"),
        (2, 0, 0x8F92EAB1, "seek table"),
        (1000, 0, 0x8F92EAB1, "seek table"),
    ],
)
def test_seek_tables_that_lie(frames: int, descriptor: int, magic: int, complaint: str) -> None:
    with pytest.raises(DataError, match=complaint):
        seek_table_bytes(SEEK_FOOTER.pack(frames, descriptor, magic), 5000)


@pytest.mark.parametrize("content", [b"", b"x", b"x" * 8])
def test_files_that_are_too_short(content: bytes) -> None:
    with pytest.raises(DataError, match="too short"):
        open_bytes(content)


def test_bytes_that_no_frame_of_the_index_holds() -> None:
    parts = Parts(small_file())
    parts.payload += skippable_frame(0x184D2A5F, b"smuggled")
    with pytest.raises(DataError, match="does not cover"):
        open_bytes(parts.join())


def test_a_seek_footer_inside_another_file() -> None:
    entries = struct.pack("<II", 1, 1) * 3
    table = skippable_frame(0x184D2A5E, entries + SEEK_FOOTER.pack(3, 0, 0x8F92EAB1))
    with pytest.raises(DataError, match="no trailer"):
        open_bytes(bytes(500) + table)
