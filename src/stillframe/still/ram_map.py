"""A picture of a snapshot's RAM: by guest-physical address, a colour for each page's class."""

from __future__ import annotations

from collections import Counter
from typing import Final

import msgspec

from stillframe.model import GpaRange
from stillframe.still.page_classes import (
    DATA,
    MISSING,
    ZERO,
    page_classes,
    pages_of_ancestor,
)
from stillframe.still.page_origins import FAULT, NEVER, decode_origins
from stillframe.still.png import png
from stillframe.still.snapshot import Snapshot

UNCHANGED: Final = 3
UNPOPULATED: Final = 4
BY_FAULT: Final = 5
CLASSES: Final = {
    MISSING: "missing",
    UNPOPULATED: "never_populated",
    ZERO: "zero",
    DATA: "data",
    UNCHANGED: "unchanged",
    BY_FAULT: "saved_by_fault",
}
COLOURS: Final = {
    MISSING: (120, 40, 40),
    ZERO: (24, 24, 32),
    DATA: (250, 190, 60),
    UNCHANGED: (60, 110, 170),
    UNPOPULATED: (96, 96, 104),
    BY_FAULT: (220, 50, 150),
}
_GAP: Final = (255, 255, 255)
_WIDTH: Final = 512
_MOST_ROWS: Final = 2048


class RamMap(msgspec.Struct, frozen=True, kw_only=True):
    """A drawn map. ``png``: the file. ``pages``: how many are of each class in ``CLASSES``.
    ``pages_per_pixel``: a pixel has the colour of the first class among its pages, in the order
    saved by fault, data, unchanged, missing, zero, never populated. ``parts``: (first row, the
    range drawn from there on)."""

    png: bytes
    width: int
    height: int
    pages_per_pixel: int
    pages: dict[str, int]
    parts: tuple[tuple[int, GpaRange], ...]


def draw_ram(snapshot: Snapshot) -> RamMap:
    """Draw the map. Only increments have pages that are unchanged since the parent; only snapshots
    of ``take`` and ``watch`` tell never-populated pages and pages saved by a fault. A white line is
    a gap in guest-physical memory; without a memory map, it separates blocks.

    Raises:
        NotFoundError: the memory map names an unknown block.
        DataError: the manifest's record of page origins does not fit.
    """
    page_bytes = snapshot.index.target_page_bytes
    parts = sorted(snapshot.manifest.memory_map, key=lambda part: part.gpa) or [
        GpaRange(gpa=0, length_bytes=b.used_length_bytes, idstr=b.idstr, offset_bytes=0)
        for b in snapshot.blocks
    ]
    origins = decode_origins(snapshot.manifest.page_origins, snapshot.blocks, page_bytes)
    classes: dict[str, bytearray] = {}
    total = 0
    for part in parts:
        if part.idstr not in classes:
            number = snapshot.block_number(part.idstr)
            classes[part.idstr] = _classes(snapshot, number, origins[number])
        total += part.length_bytes // page_bytes
    scale = max(1, -(-total // (_WIDTH * _MOST_ROWS)))
    counts: Counter[int] = Counter()
    rows = bytearray()
    places: list[tuple[int, GpaRange]] = []
    end: int | None = None
    for part in parts:
        if end is not None and part.gpa != end:
            rows += bytes(_GAP) * _WIDTH
        end = part.gpa + part.length_bytes if snapshot.manifest.memory_map else -1
        places.append((len(rows) // (3 * _WIDTH), part))
        first = part.offset_bytes // page_bytes
        pages = classes[part.idstr][first : first + -(-part.length_bytes // page_bytes)]
        counts.update(pages)
        rows += _drawn(pages, scale)
    return RamMap(
        png=png(_WIDTH, len(rows) // (3 * _WIDTH), bytes(rows)),
        width=_WIDTH,
        height=len(rows) // (3 * _WIDTH),
        pages_per_pixel=scale,
        pages={name: counts[kind] for kind, name in CLASSES.items()},
        parts=tuple(places),
    )


def _classes(snapshot: Snapshot, number: int, origins: bytes) -> bytearray:
    found = page_classes(snapshot, number)
    parent = snapshot.manifest.parent
    if parent is not None:
        shared = pages_of_ancestor(snapshot, number, parent.id)
        for page, kind in enumerate(found):
            if kind == DATA and shared[page]:
                found[page] = UNCHANGED
    for page, origin in enumerate(origins if any(origins) else b""):
        if found[page] == ZERO and origin & NEVER:
            found[page] = UNPOPULATED
        elif found[page] != MISSING and origin & FAULT:
            found[page] = BY_FAULT
    return found


def _drawn(pages: bytearray, scale: int) -> bytes:
    """Return whole rows; the rest of the last one is white."""
    order = (BY_FAULT, DATA, UNCHANGED, MISSING, ZERO, UNPOPULATED)
    colours = {kind: bytes(colour) for kind, colour in COLOURS.items()}
    if scale == 1:
        pixels = [colours[kind] for kind in pages]
    else:
        groups = (pages[start : start + scale] for start in range(0, len(pages), scale))
        pixels = [colours[next(kind for kind in order if kind in group)] for group in groups]
    pixels += [bytes(_GAP)] * (-len(pixels) % _WIDTH)
    return b"".join(pixels)
