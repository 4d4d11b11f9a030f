"""Guest RAM that is written all the time, sent in rounds, is the same at the other end."""

from __future__ import annotations

import io
import os
import threading
import time
from collections.abc import Iterator
from contextlib import ExitStack
from random import Random

import pytest

from stillframe.board.memory.guest_ram import GuestRam
from stillframe.board.memory.own_protection import Preference, open_own_protection
from stillframe.board.migration.counters import Counters
from stillframe.board.migration.ram_handler import RamHandler
from stillframe.board.migration.ram_loader import RamLoader
from stillframe.board.migration.return_path import PageRequest
from stillframe.board.migration.tracked_ram import TrackedRam
from stillframe.capture.ram_capture import RamCapture
from stillframe.errors import DataError
from stillframe.vmstate.source import StreamSource

PAGE = 4096
SIZES = {"board.ram": 6 << 20, "board.vram": 300 * PAGE}


class Writer:
    """Writes pages of the blocks at random until it is stopped."""

    def __init__(self, rams: list[GuestRam]) -> None:
        self._rams = rams
        self._stop = threading.Event()
        self.writes = 0
        self._thread = threading.Thread(target=self._run)

    def __enter__(self) -> Writer:
        self._thread.start()
        return self

    def _run(self) -> None:
        random = Random(1)
        while not self._stop.is_set():
            ram = random.choice(self._rams)
            self.writes = number = self.writes + 1
            page = random.randrange(ram.length_bytes // PAGE // 2)
            ram.write(page * PAGE + random.randrange(PAGE - 8), number.to_bytes(8, "little"))
            if number % 50 == 0:
                ram.write(page * PAGE, bytes(PAGE))

    def write_some(self) -> None:
        """Until it has gone on for a while."""
        before = self.writes
        while self.writes < before + 60:
            assert self._thread.is_alive()
            time.sleep(0.001)

    def stop(self) -> None:
        self._stop.set()
        self._thread.join()

    def __exit__(self, *_: object) -> None:
        self.stop()


class Feed:
    """A source that is filled while it is read."""

    def __init__(self) -> None:
        self.waiting = b""

    def read(self, size: int, /) -> bytes:
        part, self.waiting = self.waiting[:size], self.waiting[size:]
        return part


class Pair:
    """Two sets of RAM blocks, and what carries one to the other."""

    def __init__(self, stack: ExitStack, prefer: Preference) -> None:
        self.rams = [GuestRam(name, size) for name, size in SIZES.items()]
        self.others = [GuestRam(name, size) for name, size in SIZES.items()]
        for ram in (*self.rams, *self.others):
            stack.callback(ram.close)
        self.rams[0].write(0, os.urandom(1 << 20))
        self.capture = RamCapture(
            open_own_protection(prefer),
            os.getpid(),
            [ram.block() for ram in self.rams],
            spill_bytes=0,
        )
        stack.callback(self.capture.close)
        stack.callback(self.capture.release)
        self.capture.track_finely()
        self.counters = Counters()
        self.syncs: list[int] = []
        self.sender = TrackedRam(self.rams, self.capture, self.counters, self.syncs.append)
        stack.callback(self.sender.close)
        self.handler = RamHandler()
        self.handler.blocks = list(SIZES.items())
        self.handler.sender = self.sender
        self.capture.register()
        self.capture.start()
        self.capture.arm()
        self.sender.begin()
        by_name = {ram.idstr: ram for ram in self.others}
        self.loader = RamLoader(lambda name, _: by_name.get(name), lambda: list(by_name))
        self.destination = RamHandler()
        self.destination.loader = self.loader
        self.feed = Feed()
        self.source = StreamSource(self.feed, live=True)

    def carry(self, what: str) -> bool | None:
        """One section's payload from one end to the other."""
        out = io.BytesIO()
        result = getattr(self.handler, what)(out)
        self.feed.waiting = out.getvalue()
        self.destination.load(self.source, 4)
        assert self.source.peek() is None, "the payload is read to its end"
        return result if isinstance(result, bool) else None

    def same(self) -> bool:
        return all(
            ram.read(0, ram.length_bytes) == other.read(0, other.length_bytes)
            for ram, other in zip(self.rams, self.others, strict=True)
        )


@pytest.fixture(params=["userfaultfd", "mprotect"])
def pair(request: pytest.FixtureRequest) -> Iterator[Pair]:
    with ExitStack() as stack:
        yield Pair(stack, request.param)


def test_rounds(pair: Pair) -> None:
    with Writer(pair.rams) as writer:
        pair.carry("setup")
        for _ in range(6):
            while not pair.carry("iterate"):
                pass
            pair.sender.sync()
        assert pair.syncs == [1, 2, 3, 4, 5, 6]
        writer.stop()
    pair.sender.sync()
    pair.carry("complete_precopy")
    pair.loader.check_complete()
    assert pair.sender.written_since() == []
    assert pair.same()
    counters = pair.counters
    assert counters.remaining_bytes == 0
    assert counters.pages >= sum(SIZES.values()) // PAGE
    assert counters.zero_pages > 0


def test_holes_stay_holes(pair: Pair) -> None:
    before = os.fstat(pair.rams[0].fd).st_blocks
    pair.carry("setup")
    while not pair.carry("iterate"):
        pass
    assert os.fstat(pair.rams[0].fd).st_blocks == before
    assert os.fstat(pair.others[0].fd).st_blocks <= before
    assert pair.same()


def test_pages_that_became_zero_again(pair: Pair) -> None:
    pair.carry("setup")
    while not pair.carry("iterate"):
        pass
    pair.rams[0].write(0, bytes(1 << 20))
    pair.sender.sync()
    pair.carry("complete_precopy")
    assert pair.same()


def test_requested_pages_come_first(pair: Pair) -> None:
    pair.rams[0].write(5 << 20, b"wanted")
    pair.carry("setup")
    pair.sender.in_postcopy = True
    pair.sender.request(PageRequest("board.ram", 5 << 20, PAGE))
    pair.sender.request(PageRequest(None, 0, 2 * PAGE))
    pair.carry("iterate")
    assert pair.loader.received(0, (5 << 20) // PAGE)
    assert pair.loader.received(0, 1)
    assert pair.counters.postcopy_requests == 2
    pair.sender.request(PageRequest(None, 0, 2 * PAGE))
    while not pair.carry("iterate"):
        pass
    total_pages = sum(SIZES.values()) // PAGE
    assert pair.counters.pages == total_pages, "a page that was sent is not sent again"
    pair.carry("complete_postcopy")
    pair.loader.check_complete()
    assert pair.same()


@pytest.mark.parametrize(
    "request_",
    [
        PageRequest(None, 0, PAGE),
        PageRequest("nope", 0, PAGE),
        PageRequest("board.ram", 1, PAGE),
        PageRequest("board.ram", 0, 100),
        PageRequest("board.ram", 6 << 20, PAGE),
        PageRequest("board.ram", 1 << 63, PAGE),
    ],
)
def test_requests_that_make_no_sense(pair: Pair, request_: PageRequest) -> None:
    with pytest.raises(DataError):
        pair.sender.request(request_)


def test_an_incomplete_stream(pair: Pair) -> None:
    with pytest.raises(DataError):
        pair.loader.check_complete()
    pair.carry("setup")
    pair.carry("iterate")
    with pytest.raises(DataError) as caught:
        pair.loader.check_complete()
    assert "are not in the stream" in str(caught.value)


def test_discarded_pages_are_missing_again(pair: Pair) -> None:
    pair.carry("setup")
    while not pair.carry("iterate"):
        pass
    pair.loader.discard(0, 3, 2)
    assert not pair.loader.received(0, 4)
    assert pair.others[0].read(3 * PAGE, 2 * PAGE) == bytes(2 * PAGE)
    with pytest.raises(DataError):
        pair.loader.check_complete()
    with pytest.raises(DataError):
        pair.loader.discard(0, 0, 1 << 40)


@pytest.mark.parametrize(
    ("here", "text"),
    [
        ({"board.ram": 6 << 20}, "Unknown ramblock 'board.vram', cannot accept migration"),
        ({"board.ram": 8 << 20}, "Size mismatch: board.ram: 0x600000 != 0x800000"),
        ({**SIZES, "board.dimm0": PAGE}, "the stream has no RAM block 'board.dimm0'"),
    ],
)
def test_another_machine(here: dict[str, int], text: str) -> None:
    with ExitStack() as stack:
        rams = {name: GuestRam(name, size) for name, size in here.items()}
        for ram in rams.values():
            stack.callback(ram.close)
        loader = RamLoader(lambda name, _: rams.get(name), lambda: list(rams))
        handler = RamHandler()
        handler.blocks = list(SIZES.items())
        out = io.BytesIO()
        handler.setup(out)
        with pytest.raises(DataError) as caught:
            loader.load(StreamSource(io.BytesIO(out.getvalue())))
        assert text in str(caught.value)


def test_who_writes_here_and_there_makes_little_dirty() -> None:
    with ExitStack() as stack:
        pair = Pair(stack, "userfaultfd")
        pair.sender.written_since()
        for page in range(0, 640, 16):
            pair.rams[0].write(page * PAGE, b"x")
        assert sum(pages for _, _, pages in pair.sender.written_since()) == 40


def test_who_writes_in_order_waits_seldom() -> None:
    with ExitStack() as stack:
        pair = Pair(stack, "userfaultfd")
        before = int(pair.capture.statistics()["armed_faults"])
        for page in range(512):
            pair.rams[0].write(page * PAGE, b"x")
        assert int(pair.capture.statistics()["armed_faults"]) - before < 80
        assert sum(pages for _, _, pages in pair.sender.written_since()) >= 512
