"""The native core against its oracle, on memory of this process."""

from __future__ import annotations

import random
import threading
from typing import Literal

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from stillframe.vmstate.writer import (
    ram_page_record,
    ram_part_prefix,
    ram_part_suffix,
    ram_zero_record,
)
from tests.support.capture_oracle import CaptureOracle, OracleBlock
from tests.support.own_memory import OwnBlock, batches, core_for, end_of_faults, protected
from tests.support.probes import has_uffd_wp

PAGE, HUGE = 4096, 2 << 20
MIB = 1 << 20
SECTION_ID = 2
_COMMON = settings(
    deadline=None, suppress_health_check=[HealthCheck.too_slow, HealthCheck.data_too_large]
)

Kind = Literal["userfaultfd", "mprotect"]
each_kind = pytest.mark.parametrize("kind", ["userfaultfd", "mprotect"])


def require(kind: Kind) -> None:
    if kind == "userfaultfd":
        has_uffd_wp().require()


def make_block(name: str, pages: int, seed: int, page_bytes: int = PAGE) -> OracleBlock:
    """Pages of noise, of zeroes, almost zero, and never populated, in runs."""
    chance = random.Random(seed)
    content = bytearray(pages * page_bytes)
    populated = set()
    kind = "data"
    for target in range(len(content) // PAGE):
        if chance.random() < 0.3:
            kind = chance.choice(["data", "zero", "absent", "last", "first", "middle"])
        at = target * PAGE
        page = at // page_bytes
        if page_bytes > PAGE and at % page_bytes == 0 and chance.random() < 0.7:
            populated.add(page)
        if page_bytes == PAGE and kind != "absent":
            populated.add(page)
        if page not in populated:
            continue
        if kind == "data":
            content[at : at + PAGE] = chance.randbytes(64) * (PAGE // 64)
        elif kind in ("first", "middle", "last"):
            content[at + {"first": 0, "middle": 1234, "last": PAGE - 1}[kind]] = 1
    spare = chance.randrange(0, page_bytes // PAGE)
    return OracleBlock(
        idstr=name.encode(),
        content=bytes(content),
        page_bytes=page_bytes,
        populated=frozenset(populated),
        target_pages=max(1, len(content) // PAGE - spare),
    )


@st.composite
def small_blocks(draw: st.DrawFn) -> list[OracleBlock]:
    lengths = draw(st.lists(st.integers(1, 700), min_size=1, max_size=4))
    seeds = st.integers(0, 1 << 30)
    return [make_block(f"block-{n}" * 3, pages, draw(seeds)) for n, pages in enumerate(lengths)]


def swept(blocks: list[OracleBlock], slab_bytes: int) -> list[tuple[bytes, bytes]]:
    oracle = CaptureOracle(blocks, slab_bytes=slab_bytes, max_window_bytes=MIB)
    found = []
    while (slab := oracle.sweep()) is not None:
        found.append(oracle.pack(slab, SECTION_ID))
    return found


def assert_same(found: list[tuple[bytes, bytes]], expected: list[tuple[bytes, bytes]]) -> None:
    """Equal, without a difference of megabytes to show."""
    assert len(found) == len(expected)
    for number, (left, right) in enumerate(zip(found, expected, strict=True)):
        if left[0] != right[0]:
            at = next(
                (
                    n
                    for n, pair in enumerate(zip(left[0], right[0], strict=False))
                    if len({*pair}) > 1
                ),
                None,
            )
            raise AssertionError(
                f"batch {number} differs at byte {at}: {len(left[0])} and {len(right[0])} bytes"
            )
        assert left[1] == right[1], f"index runs of batch {number}"


@settings(_COMMON, max_examples=40)
@given(small_blocks(), st.sampled_from([256 << 10, MIB]))
def test_the_sweep_gives_the_same_bytes(blocks: list[OracleBlock], slab_bytes: int) -> None:
    own = [OwnBlock(block) for block in blocks]
    core = core_for(own, slab_bytes=slab_bytes, max_window_bytes=MIB)
    assert_same(batches(core), swept(blocks, slab_bytes))
    numbers = core.statistics()
    assert numbers["pages_zero"] + numbers["pages_data"] == sum(b.target_pages for b in blocks)


@settings(_COMMON, max_examples=8)
@given(st.integers(1, 4), st.integers(1, 300), st.integers(0, 1 << 30))
def test_huge_and_small_pages_together(huge: int, small: int, seed: int) -> None:
    blocks = [
        make_block("small", small, seed),
        make_block("huge", huge, seed + 1, HUGE),
        make_block("rom", 3, seed + 2),
    ]
    own = [OwnBlock(block) for block in blocks]
    core = core_for(own, slab_bytes=HUGE, max_window_bytes=MIB)
    assert_same(batches(core), swept(blocks, HUGE))


def limits() -> list[OracleBlock]:
    """What fills a slab's runs, its never-populated pages, and the names in its records."""
    checkered = bytes([1]) * (4000 * PAGE)
    return [
        OracleBlock(b"n" * 255, checkered, PAGE, frozenset(range(0, 4000, 2)), 4000),
        OracleBlock(b"m" * 255, bytes(40 * HUGE), HUGE, frozenset([3]), 40 * 512 - 5),
        OracleBlock(b"empty", bytes(3000 * PAGE), PAGE, frozenset(), 3000),
    ]


def test_the_limits_of_a_slab() -> None:
    blocks = limits()
    own = [OwnBlock(block) for block in blocks]
    core = core_for(own, slab_bytes=HUGE, max_window_bytes=MIB)
    assert_same(batches(core), swept(blocks, HUGE))


@each_kind
@pytest.mark.parametrize("step", [1, 2])
def test_the_limits_of_a_slab_of_faults(kind: Kind, step: int) -> None:
    require(kind)
    blocks = limits()[::2]
    own = [OwnBlock(block) for block in blocks]
    oracle = CaptureOracle(blocks, slab_bytes=MIB, max_window_bytes=PAGE)
    with protected(own, slab_bytes=MIB, max_window_bytes=PAGE, kind=kind) as core:
        for index, block in enumerate(own):
            for page in range(0, block.oracle.pages, step):
                block.write(page, 0xEE)
                oracle.fault(index, page)
        core.await_fault()  # the last write may go on before all of its window is claimed
        found = batches(core)
        end_of_faults(core, own)
        found += batches(core)
    oracle.flush()
    expected = [oracle.pack(slab, SECTION_ID) for slab in oracle.full]
    while (slab := oracle.sweep()) is not None:
        expected.append(oracle.pack(slab, SECTION_ID))
    assert_same(sorted(found), sorted(expected))


@settings(_COMMON, max_examples=20)
@given(small_blocks())
def test_sections_are_the_stream_writers(blocks: list[OracleBlock]) -> None:
    """The same records as the room that knows the stream writes them."""
    own = [OwnBlock(block) for block in blocks]
    core = core_for(own, slab_bytes=MIB, max_window_bytes=MIB)
    seen: set[tuple[str, int]] = set()
    for raw, _ in batches(core):
        expected = ram_part_prefix(SECTION_ID)
        last = None
        for name, offset, page in _records(raw):
            block = None if name == last else name
            last = name
            assert (name, offset) not in seen
            seen.add((name, offset))
            if page is None:
                expected += ram_zero_record(offset, block=block)
            else:
                assert any(page)
                expected += ram_page_record(offset, page, block=block)
        assert_same([(raw, b"")], [(expected + ram_part_suffix(SECTION_ID), b"")])
    assert len(seen) == sum(block.target_pages for block in blocks)


def _records(raw: bytes) -> list[tuple[str, int, bytes | None]]:
    found: list[tuple[str, int, bytes | None]] = []
    at, name = 5, ""
    while True:
        word = int.from_bytes(raw[at : at + 8], "big")
        at += 8
        if word & 0x10:
            return found
        if not word & 0x20:
            name = raw[at + 1 : at + 1 + raw[at]].decode()
            at += 1 + raw[at]
        page = raw[at : at + PAGE] if word & 0x08 else None
        at += PAGE if word & 0x08 else 1
        found.append((name, word & ~0xFFF, page))


@st.composite
def fault_sequences(draw: st.DrawFn) -> tuple[list[OracleBlock], list[tuple[int, int]]]:
    blocks = draw(small_blocks())
    faults: list[tuple[int, int]] = []
    for _ in range(draw(st.integers(1, 8))):
        index = draw(st.integers(0, len(blocks) - 1))
        start = draw(st.integers(0, blocks[index].pages - 1))
        step = draw(st.sampled_from([1, 1, -1, 3]))
        for n in range(draw(st.integers(1, 120))):
            if 0 <= start + n * step < blocks[index].pages:
                faults.append((index, start + n * step))
    return blocks, faults


@each_kind
@settings(_COMMON, max_examples=40)
@given(fault_sequences(), st.sampled_from([PAGE, 64 << 10, MIB]))
def test_faults_take_the_same_windows_and_slabs(
    kind: Kind, case: tuple[list[OracleBlock], list[tuple[int, int]]], window_bytes: int
) -> None:
    require(kind)
    blocks, faults = case
    oracle = CaptureOracle(blocks, slab_bytes=MIB, max_window_bytes=window_bytes)
    own = [OwnBlock(block) for block in blocks]
    with protected(own, slab_bytes=MIB, max_window_bytes=window_bytes, kind=kind) as core:
        for index, page in faults:
            own[index].write(page, 0xEE)
            oracle.fault(index, page)
        core.await_fault()  # the last write may go on before all of its window is claimed
        found = batches(core)
        end_of_faults(core, own)
        found += batches(core)
        numbers = core.statistics()
    oracle.flush()
    expected = [oracle.pack(slab, SECTION_ID) for slab in oracle.full]
    while (slab := oracle.sweep()) is not None:
        expected.append(oracle.pack(slab, SECTION_ID))
    # Which comes first, spill or sweep, is a matter of how full the spill is.
    assert_same(sorted(found), sorted(expected))
    assert numbers["error"] == 0
    assert numbers["lost"] is None


@each_kind
@settings(_COMMON, max_examples=15)
@given(
    small_blocks(),
    st.integers(1, 4),
    st.integers(2, 6),
    st.integers(0, 1 << 30),
)
def test_each_page_exactly_once_under_races(
    kind: Kind, blocks: list[OracleBlock], workers: int, spill_slabs: int, seed: int
) -> None:
    """Several workers and writers at once: every page once, as it was at the instant."""
    require(kind)
    own = [OwnBlock(block) for block in blocks]
    found: list[tuple[bytes, bytes]] = []
    with protected(
        own,
        slab_bytes=256 << 10,
        max_window_bytes=64 << 10,
        spill_slabs=spill_slabs,
        kind=kind,
    ) as core:

        def write(salt: int) -> None:
            chance = random.Random(seed + salt)
            for _ in range(200):
                index = chance.randrange(len(own))
                start = chance.randrange(blocks[index].pages)
                for page in range(start, min(start + 8, blocks[index].pages)):
                    own[index].write(page, 0xEE)

        threads = [threading.Thread(target=write, args=(n,)) for n in range(2)]
        threads += [
            threading.Thread(target=lambda: found.extend(batches(core))) for _ in range(workers)
        ]
        for thread in threads:
            thread.start()
        for thread in threads[2:]:
            thread.join()
        end_of_faults(core, own)
        found += batches(core)
        for thread in threads[:2]:
            thread.join()
        assert core.statistics()["error"] == 0
        assert core.statistics()["lost"] is None
    pages = [record for raw, _ in found for record in _records(raw)]
    assert len(pages) == len({record[:2] for record in pages})
    expected = {
        (block.idstr.decode(), target * PAGE): block.content[target * PAGE : (target + 1) * PAGE]
        for block in blocks
        for target in range(block.target_pages)
    }
    found_pages = {record[:2]: record[2] or bytes(PAGE) for record in pages}
    assert found_pages.keys() == expected.keys()
    assert [key for key in expected if found_pages[key] != expected[key]] == []
