"""RAM whose pages come later, in this process."""

from __future__ import annotations

import gc
import os
import queue
import threading
from collections.abc import Callable, Iterator

import pytest

from stillframe.board.memory import missing_pages
from stillframe.board.memory.guest_ram import GuestRam
from stillframe.board.memory.missing_pages import MissingPages
from stillframe.errors import BusyError, HostError, UsageError
from stillframe.kernel.userfaultfd import MISSING_PAGES, Userfaultfd
from tests.support.own_writer import OwnWriter, capturing, write_words
from tests.support.probes import has_uffd_wp
from tests.support.waiting import wait_until

PAGE = 4096
MIB = 1 << 20


@pytest.fixture(params=["full", "user-mode"], autouse=True)
def _kind(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """With the userfaultfd of root, and with that of ordinary users."""
    has_uffd_wp().require()
    if request.param == "user-mode":

        def for_user_mode(use: object) -> Userfaultfd:
            uffd = Userfaultfd.for_this_process(user_mode_only=True)
            uffd.handshake(MISSING_PAGES)
            return uffd

        monkeypatch.setattr(missing_pages, "own_userfaultfd", for_user_mode)


@pytest.fixture
def rams() -> Iterator[list[GuestRam]]:
    blocks = [GuestRam("first", MIB), GuestRam("second", MIB)]
    yield blocks
    for ram in blocks:
        ram.close()


class Watched:
    """Missing pages, and a queue of what is told of them."""

    def __init__(self, rams: list[GuestRam]) -> None:
        self._told: queue.Queue[tuple[int, int]] = queue.Queue()
        self.missing = MissingPages(rams, lambda block, page: self._told.put((block, page)))
        self.missing.start()

    def told(self) -> tuple[int, int]:
        return self._told.get(timeout=60)

    @property
    def nothing_told(self) -> bool:
        return self._told.empty()

    def __enter__(self) -> Watched:
        return self

    def __exit__(self, *_: object) -> None:
        self.missing.close()


class Doing(threading.Thread):
    """Does something that may wait; ``result`` waits for it, a minute at most."""

    def __init__(self, work: Callable[[], object]) -> None:
        super().__init__(daemon=True)
        self._work = work
        self._result: object = None
        self.start()

    def run(self) -> None:
        self._result = self._work()

    def result(self) -> object:
        self.join(timeout=60)
        assert not self.is_alive(), "it still waits"
        return self._result


def test_a_reader_waits_until_its_page_is_placed(rams: list[GuestRam]) -> None:
    with Watched(rams) as watched:
        reader = Doing(lambda: rams[1].read(5 * PAGE + 3, 4))
        assert watched.told() == (1, 5)
        assert reader.is_alive()
        watched.missing.place(1, 5 * PAGE, b"abcdefgh" * 512)
        assert reader.result() == b"defg"
        assert watched.nothing_told


def test_a_writer_waits_and_its_write_is_on_top(rams: list[GuestRam]) -> None:
    with Watched(rams) as watched:
        writer = Doing(lambda: rams[0].write(7 * PAGE + 8, b"mine"))
        assert watched.told() == (0, 7)
        watched.missing.place(0, 7 * PAGE, b"theirs.." * 512)
        writer.result()
        assert rams[0].read(7 * PAGE, 16) == b"theirs..mine..."[:12] + b"rs.."


def test_a_native_thread_goes_on_page_by_page(rams: list[GuestRam]) -> None:
    """Two threads through all of a block, filled on demand only."""
    with Watched(rams) as watched:
        offsets = range(0, MIB, PAGE)
        threads = [Doing(lambda: write_words(rams[0], offsets, 9)) for _ in range(2)]
        placed: set[int] = set()
        while len(placed) < MIB // PAGE:
            block, page = watched.told()
            assert block == 0
            watched.missing.place(0, page * PAGE, page.to_bytes(8, "little") * 512)
            placed.add(page)
        for thread in threads:
            thread.result()
        for page in range(MIB // PAGE):
            assert rams[0].read(page * PAGE + 8, 8) == page.to_bytes(8, "little")


def test_the_kernel_reads_a_file_into_missing_pages(rams: list[GuestRam]) -> None:
    file = os.memfd_create("disk")
    os.write(file, b"disk" * 3072)
    with Watched(rams) as watched:
        reader = Doing(lambda: rams[0].read_from(file, PAGE - 100, 2 * PAGE, 0))
        for _ in range(3):
            block, page = watched.told()
            watched.missing.place(block, page * PAGE, bytes([page + 1]) * PAGE)
        assert reader.result() == 2 * PAGE
        assert rams[0].read(PAGE - 101, 5) == b"\1disk"
        assert rams[0].read(3 * PAGE - 102, 4) == b"sk\3\3"
    os.close(file)


def test_pages_that_are_there_stay_and_the_others_are_filled(rams: list[GuestRam]) -> None:
    rams[0].write(PAGE, b"x" * PAGE)
    rams[0].write(5 * PAGE, b"y" * PAGE)
    with Watched(rams) as watched:
        watched.missing.place(0, 0, b"new." * (8 * 1024))
        watched.missing.place(0, 0, b"NEW." * (8 * 1024))
        assert rams[0].read(0, PAGE) == b"new." * 1024
        assert rams[0].read(PAGE, PAGE) == b"x" * PAGE
        assert rams[0].read(2 * PAGE, 3 * PAGE) == b"new." * 3072
        assert rams[0].read(5 * PAGE, PAGE) == b"y" * PAGE
        assert rams[0].read(6 * PAGE, 2 * PAGE) == b"new." * 2048
        watched.missing.place(0, 0, b"")
        assert watched.nothing_told


def test_cleared_pages_are_missing(rams: list[GuestRam]) -> None:
    """As when postcopy begins: what was dirtied is discarded first."""
    rams[0].write(0, b"old." * 4096)
    rams[0].clear(PAGE, 2 * PAGE)
    with Watched(rams) as watched:
        assert rams[0].read(0, PAGE) == b"old." * 1024
        reader = Doing(lambda: rams[0].read(PAGE, 2 * PAGE))
        for _ in range(2):
            block, page = watched.told()
            watched.missing.place(block, page * PAGE, b"new." * 1024)
        assert reader.result() == b"new." * 2048


def test_zeroes_are_placed_in_one_go(rams: list[GuestRam]) -> None:
    rams[0].write(3 * PAGE, b"data")
    with Watched(rams) as watched:
        reader = Doing(lambda: rams[0].read(200 * PAGE, 4))
        assert watched.told() == (0, 200)
        watched.missing.place_zeroes(0, 0, MIB)
        assert reader.result() == bytes(4)
        assert rams[0].read(0, MIB) == bytes(3 * PAGE) + b"data" + bytes(MIB - 3 * PAGE - 4)
        assert watched.nothing_told


def test_a_page_that_came_another_way_wakes_its_waiter(rams: list[GuestRam]) -> None:
    with Watched(rams) as watched:
        reader = Doing(lambda: rams[0].read(0, 4))
        assert watched.told() == (0, 0)
        os.pwrite(rams[0].fd, b"file", 0)
        watched.missing.place(0, 0, bytes(PAGE))
        assert reader.result() == b"file"


def test_closing_wakes_everybody(rams: list[GuestRam]) -> None:
    with Watched(rams) as watched:
        readers = [Doing(lambda n=n: rams[n % 2].read(n * PAGE, 4)) for n in range(6)]
        for _ in readers:
            watched.told()
        watched.missing.close()
        assert [reader.result() for reader in readers] == [bytes(4)] * 6
        watched.missing.close()
        with pytest.raises(HostError, match="cannot be placed"):
            watched.missing.place(0, 0, bytes(PAGE))
        rams[0].write(0, b"free")


def test_ram_is_watched_or_captured_not_both(rams: list[GuestRam]) -> None:
    with Watched(rams):
        with pytest.raises(BusyError, match="another"), capturing("userfaultfd", rams):
            pass
        with pytest.raises(BusyError, match="another"):
            MissingPages(rams, lambda block, page: None)
    with capturing("userfaultfd", rams), pytest.raises(BusyError, match="another"):
        MissingPages(rams, lambda block, page: None)
    with Watched(rams):
        pass


def test_a_snapshot_after_all_has_come(rams: list[GuestRam]) -> None:
    with Watched(rams) as watched:
        for block in range(2):
            watched.missing.place_zeroes(block, 0, MIB)
    with OwnWriter(rams[0]) as writer, capturing("userfaultfd", rams) as capture:
        capture.arm()
        while not capture.take_written():
            pass
        wait_until(lambda: writer.pages)  # the write is told before it is counted


@pytest.mark.parametrize(("offset", "length"), [(1, PAGE), (0, 5), (MIB, PAGE), (-PAGE, PAGE)])
def test_only_whole_pages_of_the_block_are_placed(
    rams: list[GuestRam], offset: int, length: int
) -> None:
    with Watched(rams) as watched:
        with pytest.raises(UsageError, match="first"):
            watched.missing.place(0, offset, bytes(length))
        with pytest.raises(UsageError, match="first"):
            watched.missing.place_zeroes(0, offset, length)


def test_the_probe_leaves_nothing_behind() -> None:
    gc.collect()  # else what other tests left may go meanwhile
    before = set(os.listdir("/proc/self/fd"))
    MissingPages.probe()
    assert set(os.listdir("/proc/self/fd")) <= before


def test_nobody_is_told_before_the_start(rams: list[GuestRam]) -> None:
    """Who is told may still have to be made; who waits already is told of afterwards."""
    told: queue.Queue[tuple[int, int]] = queue.Queue()
    missing = MissingPages(rams, lambda block, page: told.put((block, page)))
    try:
        reading = Doing(lambda: rams[1].read(5 * PAGE, 4))
        with pytest.raises(queue.Empty):
            told.get(timeout=0.1)
        missing.start()
        assert told.get(timeout=60) == (1, 5)
        missing.place(1, 5 * PAGE, b"\1" * PAGE)
        assert reading.result() == b"\1" * 4
    finally:
        missing.close()


def test_closed_before_the_start(rams: list[GuestRam]) -> None:
    missing = MissingPages(rams, lambda block, page: None)
    reading = Doing(lambda: rams[0].read(0, 4))
    missing.close()
    assert reading.result() == bytes(4)
