"""A capture of what changed: nothing that is written before the instant is left out, whenever."""

from __future__ import annotations

import mmap
import os
import random
import threading
from collections.abc import Iterable, Iterator
from contextlib import contextmanager

import pytest

from stillframe.board.memory.guest_ram import GuestRam
from stillframe.capture.population import private_pages
from stillframe.capture.ram_capture import RamCapture
from stillframe.model import ProtectionKind, RamBlock
from tests.support.own_memory import address_of
from tests.support.own_writer import capturing, write_words
from tests.support.probes import has_uffd_wp
from tests.support.writer_process import Captured, drain

PAGE = 4096
MIB = 1 << 20
KINDS: tuple[ProtectionKind, ...] = ("userfaultfd", "mprotect")
each_kind = pytest.mark.parametrize("kind", KINDS)


@pytest.fixture(autouse=True)
def _needs_uffd() -> None:
    has_uffd_wp().require()


@contextmanager
def ram_of(length_bytes: int) -> Iterator[GuestRam]:
    ram = GuestRam("ram", length_bytes)
    try:
        ram.write(0, b"o" * length_bytes)
        yield ram
    finally:
        ram.close()


def captured(ram: GuestRam, capture: RamCapture, into: Captured) -> dict[int, bytes | None]:
    """What is captured from now on, by page."""
    drain(capture, {ram.idstr: into})
    capture.finish()
    drain(capture, {ram.idstr: into})
    capture.check()
    assert not into.repeated
    return {at // PAGE: content for at, content in into.pages.items()}


@each_kind
def test_what_is_named_and_what_is_written_until_the_instant(kind: ProtectionKind) -> None:
    with ram_of(4 * MIB) as ram, capturing(kind, [ram]) as capture:
        into = Captured()

        def named(block: RamBlock) -> Iterable[tuple[int, int]]:
            # Before the question is answered: noted, although the answer does not know of it.
            write_words(ram, [700 * PAGE], 7)
            return [(3, 2), (1000, 1)]

        capture.copy_only(named)
        capture.arm()
        write_words(ram, [200 * PAGE], 2)
        capture.protect_written()
        write_words(ram, [500 * PAGE], 5)
        capture.instant()
        assert capture.copied_whole == ()
        write_words(ram, [300 * PAGE, 200 * PAGE, 4 * PAGE], 9)  # not of the instant
        pages = captured(ram, capture, into)
        assert {3, 4, 1000, 700, 200, 500} <= set(pages)
        # What faults while armed is noted in pieces of 64 KiB, or of a chunk.
        assert len(pages) <= 5 * 16
        assert 300 not in pages or kind == "mprotect"
        for page, word in ((700, 7), (200, 2), (500, 5)):
            content = pages[page]
            assert content is not None
            assert int.from_bytes(content[:8], "little") == word
        assert pages[4] == b"o" * PAGE
        numbers = capture.statistics()
        assert numbers["pages_done"] == len(pages)
        assert numbers["pages_unchanged"] == 1024 - len(pages)


@each_kind
def test_where_nobody_knows_all_is_copied(kind: ProtectionKind) -> None:
    with ram_of(MIB) as ram, capturing(kind, [ram]) as capture:
        into = Captured()
        capture.copy_only(lambda block: None)
        capture.arm()
        capture.instant()
        assert capture.copied_whole == (ram.idstr,)
        assert len(captured(ram, capture, into)) == MIB // PAGE


@each_kind
def test_unarmed_it_is_asked_in_the_stop(kind: ProtectionKind) -> None:
    with ram_of(MIB) as ram, capturing(kind, [ram]) as capture:
        into = Captured()
        capture.copy_only(lambda block: [(9, 1)])
        write_words(ram, [0], 1)  # before it was protected: whoever is asked has to know
        capture.instant()
        pages = captured(ram, capture, into)
        assert 9 in pages
        assert len(pages) <= 16


def test_a_write_to_what_did_not_change_needs_no_room_in_the_spill() -> None:
    """With the spill full of others' copies, nobody waits for it."""
    with ram_of(8 * MIB) as ram, capturing("userfaultfd", [ram], spill_bytes=2 * MIB) as capture:
        into = Captured()
        capture.copy_only(lambda block: [(0, 1024)])
        capture.arm()
        capture.instant()
        write_words(ram, range(0, MIB, PAGE), 1)  # of a spill of two
        writes = threading.Thread(target=write_words, args=(ram, range(4 * MIB, 8 * MIB, PAGE), 1))
        writes.start()
        writes.join(30)
        waits = writes.is_alive()
        assert set(captured(ram, capture, into)) == set(range(1024))
        writes.join()
        assert not waits


@pytest.mark.parametrize("swapped", [False, True])
def test_the_private_pages_are_those_that_were_written(swapped: bool) -> None:
    """Reading and protecting make no page one's own; all kinds of writes do."""
    chance = random.Random(3)
    fd = os.memfd_create("image", os.MFD_CLOEXEC)
    os.truncate(fd, 8 * MIB)
    for start in range(0, 4 * MIB, PAGE):  # the other half are holes
        os.pwrite(fd, b"i" * PAGE, start)
    own = mmap.mmap(fd, 8 * MIB, mmap.MAP_PRIVATE, mmap.PROT_READ | mmap.PROT_WRITE)
    block = RamBlock(
        idstr="ram", hva=address_of(own), used_length_bytes=8 * MIB, max_length_bytes=8 * MIB,
        page_size_bytes=PAGE,
    )  # fmt: skip
    for page in range(0, 2048, 3):
        own[page * PAGE]
    assert private_pages(os.getpid(), block) == []
    written = sorted(chance.sample(range(2048), 300))
    for page in written:
        own[page * PAGE] = 1
    if swapped:
        own.madvise(21)  # MADV_PAGEOUT: swapped out where there is swap
    runs = private_pages(os.getpid(), block)
    assert [page for first, count in runs for page in range(first, first + count)] == written
    os.close(fd)
