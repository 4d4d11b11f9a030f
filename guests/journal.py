"""The check, by the guest's journal, that a snapshot's RAM and disks show the same instant.

The guest's workers (``guests/linux/journal.h``) write one sequence number to RAM and to two disks.
"""

from __future__ import annotations

import struct
from collections.abc import Iterable
from pathlib import Path
from typing import NamedTuple

BLOCK_BYTES = 4096
RING = 64
DISKS = 2
DISK_BYTES = (32 << 20, 36 << 20)
"""Sizes of the two disks, by which the guest recognizes them."""
_MAGIC = 0x4C414E52554F4A46
_PAGE = struct.Struct("<6Q")
_WORDS = struct.Struct(f"<{BLOCK_BYTES // 8}Q")


class Worker(NamedTuple):
    """A worker's page in RAM: the worker was about to write ``intent``, and has written
    ``done[disk]``."""

    number: int
    workers: int
    intent: int
    done: tuple[int, ...]


def workers_in(pages: Iterable[bytes]) -> list[Worker]:
    """Find the workers' pages among those of a snapshot's RAM."""
    found = []
    for page in pages:
        magic, number, workers, intent, *done = _PAGE.unpack_from(page)
        if magic == _MAGIC:
            found.append(Worker(number, workers, intent, tuple(done)))
    return sorted(found)


def problems(workers: list[Worker], disks: list[Path]) -> list[str]:
    """Return the reasons why RAM and disks do not show one instant; empty if they do.

    Args:
        disks: the content of each disk, raw.
    """
    if not workers or [w.number for w in workers] != list(range(workers[0].workers)):
        return [f"the pages of {len(workers)} workers were found in RAM"]
    found = []
    for disk, path in enumerate(disks):
        with path.open("rb") as content:
            for worker in workers:
                content.seek(worker.number * RING * BLOCK_BYTES)
                ring = [content.read(BLOCK_BYTES) for _ in range(RING)]
                found += [f"disk {disk}: {why}" for why in _ring_problems(worker, disk, ring)]
    return found


def _ring_problems(worker: Worker, disk: int, ring: list[bytes]) -> list[str]:
    newest, found = 0, []
    numbers = []
    for place, block in enumerate(ring):
        words = set(_WORDS.unpack(block))
        if len(words) > 1:
            found.append(f"worker {worker.number}: block {place} is torn: {sorted(words)[:4]}")
        numbers.append(max(words))
    newest = max(numbers)
    if not worker.done[disk] <= newest <= worker.intent:
        found.append(
            f"worker {worker.number}: RAM says that {worker.done[disk]} is written and that"
            f" {worker.intent} was next, the disk has {newest}"
        )
    for number in range(max(1, newest - RING + 1), newest + 1):
        if numbers[number % RING] != number:
            found.append(f"worker {worker.number}: {number} is not on the disk")
    return found
