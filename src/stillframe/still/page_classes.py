"""The class of each page of a block in one snapshot: one byte per page."""

from __future__ import annotations

from typing import Final

from stillframe.still.chain import Chain
from stillframe.still.index import KIND_DATA
from stillframe.still.snapshot import Snapshot

MISSING: Final = 0
ZERO: Final = 1
DATA: Final = 2


def page_count(snapshot: Snapshot, number: int) -> int:
    """Return the number of pages of a block."""
    return -(-snapshot.blocks[number].used_length_bytes // snapshot.index.target_page_bytes)


def page_classes(snapshot: Snapshot, number: int) -> bytearray:
    """Return ``MISSING``, ``ZERO`` or ``DATA`` for each page of a block."""
    found = bytearray(page_count(snapshot, number))
    for _, run in snapshot.index.runs_of_block(number):
        kind = DATA if run.kind == KIND_DATA else ZERO
        found[run.first_page : run.first_page + run.pages] = bytes((kind,)) * run.pages
    return found


def pages_of_ancestor(snapshot: Snapshot, number: int, ancestor_id: str) -> bytearray:
    """Return 1 for each page of a block that is unchanged since an ancestor, that is, held by the
    ancestor's file or an older one; all 0 if it is no ancestor."""
    found = bytearray(page_count(snapshot, number))
    chain = snapshot.container
    ids = [file.id for file in snapshot.files]
    if not isinstance(chain, Chain) or ancestor_id not in ids:
        return found
    oldest_new = ids.index(ancestor_id)
    for frame, run in snapshot.index.runs_of_block(number):
        if chain.part_of(frame) >= oldest_new:
            found[run.first_page : run.first_page + run.pages] = b"\1" * run.pages
    return found
