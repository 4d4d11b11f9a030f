"""RAM that stays armed: each increment holds what was written since the instant before, and laid
on its parents it is RAM as it was at its own instant."""

from __future__ import annotations

import contextlib
import struct
import threading

import pytest

from stillframe.capture.ram_capture import RamCapture
from stillframe.errors import BusyError, RefusedError, SnapshotFailed
from stillframe.kernel.remote_attach import attach
from tests.support.probes import has_huge_pages, has_uffd_wp
from tests.support.watched_writer import PAGE, WatchedWriter, ram_of, watched
from tests.support.writer_process import FULL_SPEED, IDLE, Captured, WriterProcess, drain

MIB = 1 << 20
KINDS = ("private", "thp", "shared", "zero")
DROPS = (("private", "d"), ("thp", "d"), ("shared", "m"), ("zero", "m"))


@pytest.fixture(autouse=True)
def _needs_uffd() -> None:
    has_uffd_wp().require()


def write(writer: WriterProcess, page: int, value: int) -> None:
    writer.command(f"w {page * PAGE} {value}")


@pytest.mark.parametrize(
    ("kind", "pages_per_s", "spill_mib"),
    [(kind, FULL_SPEED, 64) for kind in KINDS]
    + [("private", FULL_SPEED, 2), ("shared", FULL_SPEED, 2), ("private", 2_000, 64)],
)
def test_the_chain_is_ram_at_each_instant(kind: str, pages_per_s: int, spill_mib: int) -> None:
    with (
        WriterProcess(kind, 16, pages_per_s) as writer,
        watched(writer, spill_bytes=spill_mib * MIB) as guest,
    ):
        for _ in range(4):
            captured, wrong = guest.snapshot()
            assert wrong == []
        assert len(captured.pages) <= writer.block.used_length_bytes // PAGE
        assert writer.runs()
    assert writer.block.used_length_bytes == len(guest.chain) * PAGE


@pytest.mark.parametrize("kind", KINDS)
def test_an_increment_holds_what_was_written_and_nothing_else(kind: str) -> None:
    with WriterProcess(kind, 16, IDLE) as writer, watched(writer) as guest:
        first, wrong = guest.snapshot()
        assert wrong == []
        assert len(first.pages) == writer.block.used_length_bytes // PAGE
        for turn in range(3):
            pages = [7 + 100 * n + turn for n in range(20)]
            fresh = writer.written_bytes // PAGE + 5 * turn  # never populated before
            for page in (*pages, fresh):
                write(writer, page, 1000 + turn)
            captured, wrong = guest.snapshot()
            assert wrong == []
            assert sorted(captured.pages) == sorted(page * PAGE for page in (*pages, fresh))
            assert captured.statistics["pages_wanted"] == len(captured.pages)
        captured, wrong = guest.snapshot()
        assert (captured.pages, wrong) == ({}, [])


def test_a_write_while_the_instant_is_saved_is_of_the_next_one() -> None:
    """To a page that is saved already, and to one that the write itself has saved."""
    with WriterProcess("private", 16, IDLE) as writer, watched(writer) as guest:
        for value in range(1, 5):
            truth = guest.fix()
            write(writer, 11, value)  # not saved yet: by its fault
            captured = Captured()
            drain(guest.capture, captured)
            write(writer, 500, value)  # saved, or never asked for
            guest.capture.rearm()
            write(writer, 900, value)  # all is saved
            drain(guest.capture, captured, 1)
            guest.chain.update({at: page or bytes(PAGE) for at, page in captured.pages.items()})
            assert guest.wrong(truth) == []
            expected = {11 * PAGE, 500 * PAGE, 900 * PAGE}
            assert value == 1 or set(captured.pages) == expected


def test_a_guest_that_writes_in_order_faults_seldom() -> None:
    with WriterProcess("private", 16, IDLE) as writer, watched(writer) as guest:
        guest.snapshot()
        before = int(str(guest.capture.statistics()["armed_faults"]))
        for page in range(512):
            write(writer, page, 5)
        assert int(str(guest.capture.statistics()["armed_faults"])) - before < 100
        captured, wrong = guest.snapshot()
        assert wrong == []
        assert 512 <= len(captured.pages) < 600


# --- RAM that is given back ------------------------------------------------------------------


@pytest.mark.parametrize(("kind", "how"), DROPS)
@pytest.mark.parametrize("written_again", [False, True])
def test_pages_given_back_between_instants_have_changed(
    kind: str, how: str, written_again: bool
) -> None:
    with WriterProcess(kind, 16, IDLE) as writer, watched(writer) as guest:
        for page in range(3000):
            write(writer, page, 7)
        guest.snapshot()
        for turn in range(2):
            writer.drop(how, (64 + 64 * turn) * PAGE, 32 * PAGE)
            if written_again:
                write(writer, 70 + 64 * turn, 9)
            captured, wrong = guest.snapshot()
            assert wrong == []
            assert len(captured.pages) == 32 + turn  # and not those of the turn before
            write(writer, 80 + 64 * turn, 11)  # protected again: it is in the next one


@pytest.mark.parametrize(("kind", "how"), DROPS)
def test_pages_given_back_while_the_instant_is_saved_are_of_the_next_one(
    kind: str, how: str
) -> None:
    with WriterProcess(kind, 16, IDLE) as writer, watched(writer) as guest:
        for _ in range(3):
            truth = guest.fix()
            writer.drop(how, 256 * PAGE, 16 * PAGE)  # saved by the fault thread first
            captured = Captured()
            drain(guest.capture, captured)
            writer.drop(how, 512 * PAGE, 16 * PAGE)  # saved by the sweep, or not asked for
            write(writer, 515, 3)
            guest.capture.rearm()
            drain(guest.capture, captured, 1)
            guest.chain.update({at: page or bytes(PAGE) for at, page in captured.pages.items()})
            assert guest.wrong(truth) == []
            for page in (256, 512):
                write(writer, page, 4)


@pytest.mark.parametrize("kind", ["private", "shared"])
def test_drops_and_writes_at_once(kind: str) -> None:
    how = "d" if kind == "private" else "m"
    with WriterProcess(kind, 16, FULL_SPEED) as writer, watched(writer) as guest:
        for turn in range(4):
            truth = guest.fix()
            save = threading.Thread(target=guest.save)
            save.start()
            for offset in range(0, 4 * MIB, 512 << 10):
                writer.drop(how, offset + turn * 65536, 16 << 10)
            save.join()
            assert guest.wrong(truth) == []


# --- tracking that was interrupted ----------------------------------------------------------------


@pytest.mark.parametrize("saving", [False, True])
def test_ram_that_was_unmapped_voids_what_was_tracked(saving: bool) -> None:
    with WriterProcess("private", 16, IDLE) as writer, watched(writer) as guest:
        guest.snapshot()
        if saving:
            guest.fix()
            drain(guest.capture, Captured())
        writer.drop("u", 16 * PAGE, 16 * PAGE)
        with pytest.raises(SnapshotFailed, match="unmapped"):
            guest.capture.check()


def test_nobody_else_can_watch_ram_that_is_armed() -> None:
    """So no other userfaultfd can have swallowed a write."""
    with WriterProcess("private", 16, IDLE) as writer, watched(writer) as guest:
        guest.snapshot()
        with contextlib.closing(attach(writer.pid)) as other, pytest.raises(BusyError):
            other.register(writer.block.hva, writer.block.used_length_bytes)
        write(writer, 5, 9)
        captured, wrong = guest.snapshot()
        assert (list(captured.pages), wrong) == ([5 * PAGE], [])


def test_huge_pages_are_refused() -> None:
    has_huge_pages(48).require()
    with (
        WriterProcess("hugetlb", 48, IDLE) as writer,
        pytest.raises(RefusedError, match="watched"),
        watched(writer),
    ):
        pass


@pytest.mark.parametrize("saving", [False, True])
def test_release_lets_every_write_pass(saving: bool) -> None:
    with WriterProcess("private", 16, FULL_SPEED) as writer, watched(writer) as guest:
        guest.snapshot()
        if saving:
            guest.fix()
        guest.capture.release()
        assert writer.runs()


# --- controls: without these the tests above would show nothing ----------------------------------


class NotProtectedAgain(RamCapture):
    """What was written stays un-protected, although it was noted once."""

    def settle(self) -> float:
        return 0.0

    def protect_written(self) -> int:
        if not self._core.statistics()["pages_done"]:
            return super().protect_written()
        for index, first, pages in self._core.noted_runs():
            self._core.protect_noted()
            self._core.unregister(index, first, pages)
        return 0


class Unprotected(RamCapture):
    """The sweep's pages are un-protected, as for a single snapshot."""

    def stay_armed(self) -> None:
        pass


@pytest.mark.parametrize("broken", [NotProtectedAgain, Unprotected])
def test_control_is_caught(broken: type[RamCapture]) -> None:
    with WriterProcess("private", 16, IDLE) as writer, watched(writer, kind=broken) as guest:
        wrong: list[int] = []
        for turn in range(4):
            for page in range(0, 300, 3):
                write(writer, page, 50 + turn)
            wrong += guest.snapshot()[1]
        assert wrong


def test_the_truth_is_read_right() -> None:
    with WriterProcess("shared", 16, IDLE) as writer:
        write(writer, 3, 77)
        assert struct.unpack_from("<Q", ram_of(writer), 3 * PAGE) == (77,)
        assert isinstance(WatchedWriter, type)
