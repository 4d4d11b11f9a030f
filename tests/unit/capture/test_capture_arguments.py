"""The core's edges: arguments it refuses, population marks, and statistics of nothing."""

from __future__ import annotations

import array

import pytest

from stillframe.capture import _capture
from tests.support.capture_oracle import OracleBlock
from tests.support.own_memory import OwnBlock, batches, core_for

PAGE, HUGE, MIB = 4096, 2 << 20, 1 << 20
PRESENT, SWAP, UFFD_WP, MARKER = 1 << 63, 1 << 62, 1 << 57, 31


def block(pages: int = 8, page_bytes: int = PAGE) -> OwnBlock:
    length = pages * page_bytes
    return OwnBlock(OracleBlock(b"ram", b"x" * length, page_bytes, frozenset(), length // PAGE))


def core(own: OwnBlock) -> _capture.Capture:
    return core_for([own], slab_bytes=HUGE, max_window_bytes=MIB, spill_slabs=2)


@pytest.mark.parametrize("page_bytes", [0, 2048, 4097, 4 << 20])
def test_page_sizes_that_cannot_be(page_bytes: int) -> None:
    with pytest.raises(ValueError, match="page size"):
        _capture.Capture(
            -1,
            -1,
            1,
            [(0, 1, 1, page_bytes, -1, 0, 0, b"ram")],
            slab_bytes=HUGE,
            spill_slabs=1,
            max_window_bytes=MIB,
        )


def test_a_name_that_is_too_long() -> None:
    with pytest.raises(ValueError, match="longer"):
        _capture.Capture(
            -1,
            -1,
            1,
            [(0, 1, 1, PAGE, -1, 0, 0, b"n" * 256)],
            slab_bytes=HUGE,
            spill_slabs=1,
            max_window_bytes=MIB,
        )


@pytest.mark.parametrize(
    ("index", "first", "pages"), [(1, 0, 1), (0, 8, 1), (0, 0, 9), (0, 7, 2), (0, 1, 2**64 - 1)]
)
def test_pages_outside_the_blocks(index: int, first: int, pages: int) -> None:
    own = block()
    for method in (core(own).mark_populated, core(own).protect, core(own).unregister):
        with pytest.raises(ValueError, match="block"):
            method(index, first, pages)


def test_a_page_map_that_is_too_long() -> None:
    own = block(2, HUGE)
    entries = array.array("Q", [0] * 513)
    with pytest.raises(ValueError, match="outside"):
        core(own).mark_populated_from_pagemap(0, entries, 1)
    core(own).mark_populated_from_pagemap(0, entries[:512], 1)


def test_which_page_map_entries_count_as_populated() -> None:
    entries = {
        0: False,
        PRESENT: True,
        PRESENT | UFFD_WP: True,
        SWAP | 5: True,
        SWAP | UFFD_WP | 5: True,
        SWAP | UFFD_WP | MARKER: False,  # our own protection of an empty page
        SWAP | MARKER: True,  # a poisoned page: reading it fails, and must
        UFFD_WP: False,  # the same of a huge page
    }
    own = block(len(entries))
    tested = core(own)
    for page, value in enumerate(entries.values()):
        if value:
            own.write(page, 1)
    tested.mark_populated_from_pagemap(0, array.array("Q", entries), 0)
    batches(tested)
    numbers = tested.statistics()
    assert numbers["pages_never_populated"] == list(entries.values()).count(False)
    assert numbers["pages_data"] == list(entries.values()).count(True)


def test_statistics_before_anything_happened() -> None:
    own = block()
    numbers = core(own).statistics()
    assert numbers["faults"] == 0
    assert numbers["fault_p50_us"] == 0
    assert numbers["lost"] is None
    assert numbers["spill_used_bytes"] == 0


def test_memory_that_is_gone_is_lost_and_named() -> None:
    tested = _capture.Capture(
        -1,
        -1,
        1,
        [(0x1000, 1, 1, PAGE, -1, 0, 0, b"ram")],
        slab_bytes=MIB,
        spill_slabs=2,
        max_window_bytes=MIB,
    )
    tested.mark_populated(0, 0, 1)
    batches(tested)
    numbers = tested.statistics()
    assert numbers["lost"] == (_capture.LOST_UNMAPPED, 0x1000, PAGE) or numbers["error"] < 0
