"""Where the data of a shmem file end."""

from __future__ import annotations

import os
import random
from collections.abc import Iterator

import pytest

from stillframe.capture import population
from stillframe.capture.population import end_of_data

PAGE = 4096
WINDOW = population._WINDOW_BYTES
FILE = 8 * WINDOW


@pytest.fixture
def fd() -> Iterator[int]:
    made = os.memfd_create("population")
    os.ftruncate(made, FILE)
    yield made
    os.close(made)


def fill(fd: int, start: int, end: int) -> None:
    os.pwrite(fd, b"x" * (end - start), start)


@pytest.mark.parametrize(
    ("start", "hole", "after"),
    [
        (0, PAGE, 0),
        (0, WINDOW, 0),
        (PAGE, WINDOW + PAGE, 0),
        (0, 3 * WINDOW, WINDOW),
        (3 * PAGE, 4 * WINDOW - PAGE, 4 * WINDOW),
        (WINDOW - PAGE, FILE - 2 * PAGE, PAGE),
        (0, FILE, 0),
    ],
)
@pytest.mark.parametrize("asked", ["cachestat", "no cachestat"])
def test_the_first_hole_is_found(
    fd: int, start: int, hole: int, after: int, asked: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    if asked == "no cachestat":
        monkeypatch.setattr(population, "pages_there", lambda *_: -38)
    fill(fd, start, hole)
    fill(fd, FILE - after, FILE)
    assert end_of_data(fd, start, FILE) == hole
    assert end_of_data(fd, start, start + PAGE) == start + PAGE


def test_it_is_what_the_kernel_says(fd: int) -> None:
    dice = random.Random(5)
    for _ in range(12):
        start = dice.randrange(FILE // PAGE) * PAGE
        fill(fd, start, min(FILE, start + dice.choice([1, 3, 700, 2500]) * PAGE))
    at = 0
    for _ in range(100):
        try:
            at = os.lseek(fd, at, os.SEEK_DATA)
        except OSError:
            return
        end = end_of_data(fd, at, FILE)
        assert end == os.lseek(fd, at, os.SEEK_HOLE)
        at = end


def test_no_walk_of_the_kernel_is_longer_than_a_window(
    fd: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A walk keeps a processor from the thread that serves the guest's faults."""
    fill(fd, 0, FILE)
    walks = []
    real = os.lseek

    def watch(fd: int, at: int, whence: int) -> int:
        found = real(fd, at, whence)
        walks.append(found - at)
        return found

    monkeypatch.setattr(os, "lseek", watch)
    assert end_of_data(fd, 0, FILE) == FILE
    assert walks
    assert max(walks) <= WINDOW
