"""Reading a local file: what is asked of the medium ahead of time."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from stillframe.store.backends.local_source import LocalSource

MIB = 1 << 20


@pytest.fixture
def asked(monkeypatch: pytest.MonkeyPatch) -> list[tuple[int, int]]:
    """(first, end) of what was asked for, with neighbours joined."""
    found: list[tuple[int, int]] = []

    def note(_fd: int, offset: int, length: int, advice: int) -> None:
        assert advice == os.POSIX_FADV_WILLNEED
        first = found.pop()[0] if found and found[-1][1] == offset else offset
        found.append((first, offset + length))

    monkeypatch.setattr(os, "posix_fadvise", note)
    return found


@pytest.fixture
def source(tmp_path: Path) -> LocalSource:
    path = tmp_path / "file"
    path.touch()
    os.truncate(path, 64 * MIB)
    return LocalSource(path)


def test_reads_that_go_on_are_read_ahead(source: LocalSource, asked: list[tuple[int, int]]) -> None:
    for number in range(4):
        source.read_at(number * MIB, MIB)
    assert asked == [(2 * MIB, 12 * MIB)]


def test_reads_out_of_turn_ask_for_nothing_and_do_not_end_it(
    source: LocalSource, asked: list[tuple[int, int]]
) -> None:
    """Two threads of a sweep, which overtake each other, and what a guest waits for."""
    for number in (0, 1, 40, 3, 2, 20, 5, 4):
        source.read_at(number * MIB, MIB)
    assert asked == [(2 * MIB, 14 * MIB)]


def test_nothing_is_asked_for_beyond_the_end(
    source: LocalSource, asked: list[tuple[int, int]]
) -> None:
    for number in range(60, 64):
        source.read_at(number * MIB, MIB)
    assert asked == [(62 * MIB, 64 * MIB)]
