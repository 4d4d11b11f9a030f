"""One frame: sizes, damage, bombs, and what other zstd tools think of it."""

from __future__ import annotations

import os
import shutil
import subprocess
import threading
import tracemalloc
import zlib

import pytest

from stillframe.errors import DataError, UsageError
from stillframe.still.frames import (
    FRAME_RAW_MAX_BYTES,
    LEVEL_DEFAULT,
    LEVEL_NONE,
    compress_frame,
    decompress_frame,
    digest_of,
    skippable_frame,
)

TEXT = b"All pages of a guest, page after page. " * 3000


@pytest.mark.parametrize("level", [LEVEL_NONE, -7, 1, 3, 19])
@pytest.mark.parametrize("raw", [b"", b"x", TEXT, os.urandom(300_000), bytes(1 << 20)])
def test_round_trip(level: int, raw: bytes) -> None:
    frame = compress_frame(raw, level)
    assert frame.raw_bytes == len(raw)
    assert frame.digest == digest_of(frame.data)
    assert decompress_frame(frame.data, len(raw)) == raw


@pytest.mark.parametrize("level", [20, -51, 23, -131071])
def test_unknown_levels_are_refused(level: int) -> None:
    with pytest.raises(UsageError, match="not supported"):
        compress_frame(b"x", level)


def test_none_does_not_compress_and_still_has_a_checksum() -> None:
    frame = compress_frame(TEXT, LEVEL_NONE)
    assert len(frame.data) >= len(TEXT)
    assert TEXT[:1000] in frame.data
    flipped = bytearray(frame.data)
    flipped[500] ^= 1
    with pytest.raises(DataError, match="damaged"):
        decompress_frame(flipped, len(TEXT))


def test_any_buffer_can_be_compressed() -> None:
    for raw in (TEXT, bytearray(TEXT), memoryview(b"ab" + TEXT)[2:]):
        assert decompress_frame(compress_frame(raw, 1).data, len(TEXT)) == TEXT


@pytest.mark.skipif(shutil.which("zstd") is None, reason="missing program: zstd")
@pytest.mark.parametrize("level", [LEVEL_NONE, LEVEL_DEFAULT])
def test_the_zstd_program_reads_it_and_sees_the_checksum(level: int) -> None:
    data = compress_frame(TEXT, level).data + skippable_frame(0x184D2A50, b"ours")
    done = subprocess.run(["zstd", "-dc"], input=data, capture_output=True, timeout=60, check=True)
    assert done.stdout == TEXT
    wrong = bytearray(data)
    wrong[len(compress_frame(TEXT, level).data) - 1] ^= 0x40  # in the checksum
    failed = subprocess.run(["zstd", "-dc"], input=wrong, capture_output=True, timeout=60)
    assert failed.returncode != 0


@pytest.mark.parametrize("said", [0, 1, len(TEXT) - 1, len(TEXT) + 1, 10 * len(TEXT)])
def test_another_size_than_said(said: int) -> None:
    with pytest.raises(DataError, match="holds"):
        decompress_frame(compress_frame(TEXT, 1).data, said)


@pytest.mark.parametrize("said", [-1, FRAME_RAW_MAX_BYTES + 1, 1 << 40])
def test_a_size_that_no_frame_has(said: int) -> None:
    with pytest.raises(DataError, match="allowed"):
        decompress_frame(compress_frame(TEXT, 1).data, said)


def test_a_bomb_is_not_expanded() -> None:
    bomb = compress_frame(bytes(FRAME_RAW_MAX_BYTES), 19).data
    assert len(bomb) < 10_000
    tracemalloc.start()
    try:
        with pytest.raises(DataError, match="more than"):
            decompress_frame(bomb, 1 << 20)
        assert tracemalloc.get_traced_memory()[1] < 8 << 20
    finally:
        tracemalloc.stop()


@pytest.mark.parametrize("cut", [0, 1, 4, 10, -1, -4])
def test_truncated(cut: int) -> None:
    data = compress_frame(TEXT, 1).data
    with pytest.raises(DataError):
        decompress_frame(data[:cut], len(TEXT))


def test_more_than_one_frame() -> None:
    data = compress_frame(TEXT, 1).data
    with pytest.raises(DataError):
        decompress_frame(data + data, len(TEXT))
    with pytest.raises(DataError, match="end"):
        decompress_frame(data + b"\0", len(TEXT))


def test_not_zstd_at_all() -> None:
    for data in (zlib.compress(TEXT), b"", b"\0" * 100, os.urandom(1000)):
        with pytest.raises(DataError):
            decompress_frame(data, len(TEXT))


def test_frames_that_are_too_large_are_refused() -> None:
    with pytest.raises(UsageError, match="too large"):
        compress_frame(bytes(FRAME_RAW_MAX_BYTES + 1), 1)


def test_threads_do_not_disturb_each_other() -> None:
    raws = [bytes([n]) * 100_000 + os.urandom(1000) for n in range(4)]
    results: dict[int, bool] = {}

    def work(number: int) -> None:
        same = [
            decompress_frame(compress_frame(raws[number], 1).data, 101_000) == raws[number]
            for _ in range(20)
        ]
        results[number] = all(same)

    threads = [threading.Thread(target=work, args=(n,)) for n in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert results == dict.fromkeys(range(4), True)
