"""The capture core on a real process that writes its memory in a known order."""

from __future__ import annotations

import fcntl
import os
import random
import struct
import subprocess
import sys
import threading
import time
from pathlib import Path

import msgspec
import pytest

from stillframe.capture import _capture
from stillframe.capture.ram_capture import RamCapture
from stillframe.errors import MachineError, SnapshotFailed
from stillframe.model import StoppedWrite
from tests.support.capture_child import STAGES
from tests.support.probes import has_huge_pages, has_uffd_wp
from tests.support.waiting import wait_until
from tests.support.writer_process import (
    FULL_SPEED,
    IDLE,
    SECTION_ID,
    Captured,
    WriterProcess,
    armed,
    drain,
    stop_and_fix,
    take,
)

MIB = 1 << 20
RAM_MIB = 16
HUGE_RAM_MIB = 48
KINDS = ("private", "thp", "shared", "zero", "hugetlb", "hugetlb-private", "hugetlb-private-memfd")
_UFFDIO_WRITEPROTECT = 0xC018AA06
PROMPT_S = 10.0
"""It takes milliseconds; a busy host may not run us for seconds. What is stuck is so for ever."""
_ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture(autouse=True)
def _needs_uffd() -> None:
    has_uffd_wp().require()


def start(kind: str, pages_per_s: int) -> WriterProcess:
    if kind.startswith("hugetlb"):
        has_huge_pages(HUGE_RAM_MIB).require()
        return WriterProcess(kind, HUGE_RAM_MIB, pages_per_s)
    return WriterProcess(kind, RAM_MIB, pages_per_s)


def assert_one_instant(writer: WriterProcess, captured: Captured) -> None:
    assert not captured.repeated
    assert len(captured.pages) == writer.block.used_length_bytes // 4096
    assert not captured.is_torn(writer.written_bytes, writer.block.page_size_bytes)


# --- one instant -----------------------------------------------------------------------------


def _require_huge_page_in(writer: WriterProcess) -> None:
    rollup = Path(f"/proc/{writer.pid}/smaps_rollup").read_text()
    if any(line.split()[:2] == ["AnonHugePages:", "0"] for line in rollup.splitlines()):
        pytest.skip("missing thp: the kernel gave no transparent huge pages")


@pytest.mark.parametrize("arm", [True, False], ids=["armed", "unarmed"])
@pytest.mark.parametrize("pages_per_s", [FULL_SPEED, 200_000, 2_000])
@pytest.mark.parametrize("kind", KINDS)
def test_never_torn(kind: str, pages_per_s: int, arm: bool) -> None:
    with start(kind, pages_per_s) as writer:
        if kind == "thp":
            _require_huge_page_in(writer)
        for _ in range(3):
            assert_one_instant(writer, take(writer, spill_bytes=64 * MIB, arm=arm))
        assert writer.runs()


class Unprotected(RamCapture):
    """The control: everything is un-protected right after the instant."""

    def instant(self) -> tuple[StoppedWrite, ...]:
        writes = super().instant()
        assert self._protection is not None
        for block in self._blocks:
            argument = struct.pack("=QQQ", block.hva, block.used_length_bytes, 0)
            fcntl.ioctl(self._protection.fileno(), _UFFDIO_WRITEPROTECT, argument)
        return writes


class NotProtectedAgain(RamCapture):
    """The control: what was written while armed stays un-protected."""

    def arm(self) -> float:
        took_ms = super().arm()
        time.sleep(0.02)  # time to write everything
        return took_ms

    def protect_written(self) -> int:
        return 0 if self._armed else super().protect_written()


@pytest.mark.parametrize("broken", [Unprotected, NotProtectedAgain])
@pytest.mark.parametrize("kind", ["private", "shared"])
def test_control_without_protection_is_caught(kind: str, broken: type[RamCapture]) -> None:
    """Without this, ``test_never_torn`` would show nothing."""
    with start(kind, FULL_SPEED) as writer:
        for _ in range(100):  # on a busy host the sweep may be over before the writer goes on
            captured = take(writer, kind=broken)
            if captured.is_torn(writer.written_bytes, writer.block.page_size_bytes):
                return
        pytest.fail("no snapshot was torn")


class Pinning(RamCapture):
    def arm(self) -> float:
        self.pin_droppable()
        return super().arm()


@pytest.mark.parametrize(
    ("ram", "kind"), [("private", RamCapture), ("shared", Pinning)], ids=["plain", "held"]
)
def test_faults_are_served_while_somebody_keeps_the_gil(ram: str, kind: type[RamCapture]) -> None:
    """Also of pages of zeroes in RAM that is held, which are looked up there."""
    with start(ram, IDLE) as writer, armed(writer, kind=kind) as capture:
        writer.send("w 0 7")
        assert writer.answers_with_gil_held(60), "a fault of the armed phase waited"
        writer.answer(60)
        stop_and_fix(writer, capture)
        for offset in range(8192, 8192 + 64 * 8192, 8192):
            writer.send(f"w {offset} 7")
            assert writer.answers_with_gil_held(60), "a fault of the saving phase waited"
            writer.answer(60)


def test_a_pass_of_arming_in_which_the_guest_writes_new_pages() -> None:
    """Pages first written while armed are in the snapshot, their neighbours stay holes, and
    neither counts as RAM that was dropped."""
    with start("shared", IDLE) as writer, armed(writer) as capture:
        first = writer.written_bytes
        for n in range(20):
            writer.command(f"w {first + n * 17 * 4096} {n + 1}")
        captured = Captured()
        stop_and_fix(writer, capture)
        drain(capture, captured)
        capture.finish()
        drain(capture, captured)
        capture.check()
        for n in range(20):
            page = captured.pages[first + n * 17 * 4096]
            assert page is not None
            assert page[:8] == struct.pack("<Q", n + 1)
        resident = writer.command(f"i {first} {writer.block.used_length_bytes - first}").result
        assert resident == 20


def test_the_last_huge_page_ends_with_the_used_length() -> None:
    """A block of hugetlb pages may be longer than what goes into the stream."""
    with start("hugetlb", IDLE) as writer:
        whole = writer.block
        writer.block = msgspec.structs.replace(whole, used_length_bytes=5 * MIB + 8192)
        captured = take(writer)
        assert sorted(captured.pages) == list(range(0, 5 * MIB + 8192, 4096))
        assert not captured.repeated


# --- the spill ---------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["private", "shared"])
def test_a_full_spill_makes_the_guest_wait_and_loses_nothing(kind: str) -> None:
    with start(kind, FULL_SPEED) as writer, armed(writer, spill_bytes=2 * MIB) as capture:
        captured = Captured()
        stop_and_fix(writer, capture)
        wait_until(lambda: capture.statistics()["stalls"], "the guest did not wait")
        waiting = writer.command().written_pages
        time.sleep(0.4)
        assert writer.command().written_pages == waiting, "the guest did not wait"
        # Who drops RAM meanwhile waits for the fault thread to read the event, and for no room.
        writer.drop("d", writer.block.used_length_bytes - 4096, 4096)
        drain(capture, captured)
        capture.finish()
        drain(capture, captured)
        capture.check()
        assert_one_instant(writer, captured)
        numbers = capture.statistics()
        assert numbers["stalls"]
        assert float(str(numbers["stall_ms"])) > 300
        assert numbers["spill_peak_bytes"] == 2 * MIB
        assert writer.runs()


# --- pages that were never populated ------------------------------------------------------------


def _present_pages(writer: WriterProcess) -> int:
    """Pages of the block that the process's page tables show (the zero page counts too)."""
    with open(f"/proc/{writer.pid}/pagemap", "rb") as pagemap:
        pagemap.seek(writer.block.hva // 4096 * 8)
        content = pagemap.read(writer.block.used_length_bytes // 4096 * 8)
    return sum(entry[0] >> 63 for entry in struct.iter_unpack("=Q", content))


@pytest.mark.parametrize(
    "kind", ["private", "shared", "zero", "hugetlb", "hugetlb-private", "hugetlb-private-memfd"]
)
def test_never_populated_pages_are_not_read_nor_made_resident(kind: str) -> None:
    with start(kind, IDLE) as writer:
        hole = writer.block.used_length_bytes - writer.written_bytes
        assert _present_pages(writer) * 4096 == writer.written_bytes
        captured = take(writer)
        assert captured.statistics["pages_never_populated"] == hole // 4096
        assert _present_pages(writer) * 4096 == writer.written_bytes
        if not kind.startswith("hugetlb"):
            assert writer.command(f"i {writer.written_bytes} {hole}").result == 0


def test_a_hole_of_shared_memory_stays_a_hole() -> None:
    for kind in ("shared", "hugetlb", "hugetlb-private-memfd"):
        with start(kind, IDLE) as writer:
            path = f"/proc/{writer.pid}/fd/{writer.block.backing_fd}"
            before = os.stat(path).st_blocks
            assert_one_instant(writer, take(writer))
            assert os.stat(path).st_blocks == before


# --- writes while the guest is stopped ----------------------------------------------------------


@pytest.mark.parametrize("kind", ["private", "shared", "hugetlb"])
def test_writes_while_stopped_are_reported_and_belong_to_the_instant(kind: str) -> None:
    with start(kind, IDLE) as writer, armed(writer) as capture:
        page = writer.block.page_size_bytes
        writer.command("p")
        capture.protect_written()
        writer.command(f"w {3 * page + 128} 77")
        writes = capture.instant()
        writer.command(f"w {3 * page + 128} 78")
        writer.command("c")
        captured = Captured()
        drain(capture, captured)
        capture.finish()
        drain(capture, captured)
        capture.check()
        target = captured.pages[3 * page]
        assert target is not None
        assert target[128:136] == struct.pack("<Q", 77)
        assert len(writes) == 1
        assert writes[0].idstr == "pc.ram"
        assert writes[0].offset_bytes <= 3 * page < writes[0].offset_bytes + writes[0].length_bytes


def test_no_write_while_stopped_is_reported_where_there_was_none() -> None:
    with start("private", FULL_SPEED) as writer:
        for _ in range(10):
            assert take(writer).writes == ()


# --- RAM that goes away ---------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("kind", "how"),
    [
        ("private", "u"),
        ("shared", "h"),
        ("shared", "u"),
        ("hugetlb", "h"),
    ],
)
def test_ram_gone_before_anybody_is_told_fails_the_snapshot(kind: str, how: str) -> None:
    with start(kind, IDLE) as writer, armed(writer) as capture:
        page = writer.block.page_size_bytes
        stop_and_fix(writer, capture)
        writer.drop(how, 2 * page, 4 * page)
        captured = Captured()
        drain(capture, captured)
        with pytest.raises(SnapshotFailed, match=r"pc\.ram") as caught:
            capture.check()
        assert caught.value.guest_state == "running"
        capture.release()
        assert writer.command().result == 0


@pytest.mark.parametrize("how", ["h", "hm"])
def test_shared_pages_that_are_pinned_are_saved_after_they_were_punched_out(how: str) -> None:
    """``hm`` is QEMU's way: it punches the file, and only then calls what the kernel tells of.
    Each page has a content of its own, and keeps it, also beside one that was punched out."""
    with start("shared", IDLE) as writer:
        offsets = range(0, writer.written_bytes, 4096)
        for offset in offsets:
            writer.command(f"w {offset} {offset + 1}")
        with armed(writer, kind=Pinning) as capture:
            stop_and_fix(writer, capture)
            for n in range(100):
                for one in how:
                    writer.drop(one, (2 + 3 * n) * 4096, 4096)
            writer.drop("h", MIB, MIB)
            writer.command(f"w {MIB + 4096} 9")
            captured = Captured()
            drain(capture, captured)
            capture.finish()
            drain(capture, captured)
            capture.check()
        pages = {at: page or bytes(4096) for at, page in captured.pages.items()}
        assert not captured.repeated
        assert [int.from_bytes(pages[at][:8], "little") for at in offsets] == [
            at + 1 for at in offsets
        ]
        assert not any(any(pages[at][8:]) for at in offsets)


def test_what_was_punched_out_while_armed_is_another_page_than_the_pinned_one() -> None:
    """Dropped, written anew, and dropped once more after the instant: nobody has it any more."""
    with start("shared", IDLE) as writer, armed(writer, kind=Pinning) as capture:
        for one in "hm":
            writer.drop(one, 8 * 4096, 4096)
        writer.command(f"w {8 * 4096} 5")
        stop_and_fix(writer, capture)
        writer.drop("h", 8 * 4096, 4096)
        captured = Captured()
        drain(capture, captured)
        with pytest.raises(SnapshotFailed, match="punched out"):
            capture.check()


@pytest.mark.parametrize("refilled", [True, False])
def test_a_huge_page_punched_out_while_others_come_fails_the_snapshot(refilled: bool) -> None:
    """No sum shows it, nor does a page that is there again."""
    with start("hugetlb", IDLE) as writer, armed(writer) as capture:
        page = writer.block.page_size_bytes
        stop_and_fix(writer, capture)
        writer.drop("h", 2 * page, page)
        for n in range(3):
            writer.command(f"w {writer.written_bytes + n * page} 5")
        if refilled:
            writer.command(f"w {2 * page} 5")
        captured = Captured()
        drain(capture, captured)
        capture.finish()
        drain(capture, captured)
        with pytest.raises(SnapshotFailed, match=r"pc\.ram"):
            capture.check()
        assert writer.command().result == 0


@pytest.mark.parametrize("kind", ["hugetlb", "hugetlb-private-memfd"])
def test_huge_pages_that_come_while_armed_are_in_the_snapshot(kind: str) -> None:
    with start(kind, IDLE) as writer, armed(writer) as capture:
        page = writer.block.page_size_bytes
        first = writer.written_bytes
        writer.command(f"w {first + 2 * page} 7")
        captured = Captured()
        stop_and_fix(writer, capture)
        writer.command(f"w {first + 3 * page} 8")
        drain(capture, captured)
        capture.finish()
        drain(capture, captured)
        capture.check()
        found = captured.pages[first + 2 * page]
        assert found is not None
        assert found[:8] == struct.pack("<Q", 7)
        assert captured.pages[first + 3 * page] is None


@pytest.mark.parametrize(
    ("kind", "how"),
    [
        ("private", "d"),
        ("thp", "d"),
        ("shared", "m"),
        ("zero", "m"),
        ("hugetlb-private", "d"),
    ],
)
def test_ram_about_to_be_dropped_is_saved_first(kind: str, how: str) -> None:
    """The kernel holds whoever drops RAM until its event is read."""
    with start(kind, IDLE) as writer, armed(writer, spill_bytes=8 * MIB) as capture:
        page = writer.block.page_size_bytes
        stop_and_fix(writer, capture)
        writer.drop(how, 2 * page, 4 * page)
        if kind != "hugetlb-private":
            for n in range(200):
                writer.drop(how, (100 + 2 * n) * 4096, 4096)
        captured = Captured()
        drain(capture, captured)
        capture.finish()
        drain(capture, captured)
        capture.check()
        assert_one_instant(writer, captured)


@pytest.mark.parametrize(("kind", "how"), [("private", "d"), ("shared", "m")])
def test_more_is_dropped_at_once_than_the_spill_takes(kind: str, how: str) -> None:
    """Who drops it waits for room, as a write does."""
    with start(kind, IDLE) as writer, armed(writer, spill_bytes=2 * MIB) as capture:
        stop_and_fix(writer, capture)
        drop = threading.Thread(target=writer.drop, args=(how, 0, 8 * MIB))
        drop.start()
        time.sleep(0.3)
        assert drop.is_alive(), "nobody waited"
        captured = Captured()
        drain(capture, captured)
        drop.join(timeout=60)
        assert not drop.is_alive()
        capture.finish()
        drain(capture, captured)
        capture.check()
        assert_one_instant(writer, captured)


def test_cancelled_while_a_drop_waits_for_room() -> None:
    with start("private", IDLE) as writer, armed(writer, spill_bytes=2 * MIB) as capture:
        stop_and_fix(writer, capture)
        drop = threading.Thread(target=writer.drop, args=("d", 0, 8 * MIB))
        drop.start()
        time.sleep(0.2)
        assert drop.is_alive()
        capture.release()
        drop.join(timeout=PROMPT_S)
        assert not drop.is_alive()


@pytest.mark.parametrize(("kind", "how"), [("private", "d"), ("shared", "m"), ("zero", "m")])
def test_ram_dropped_while_armed_is_zero_and_protected_again(kind: str, how: str) -> None:
    """The guest gave the pages up before the instant, and may write them after it."""
    with start(kind, IDLE) as writer, armed(writer) as capture:
        writer.drop(how, 8 * 4096, 64 * 4096)
        writer.command(f"w {16 * 4096} 5")
        stop_and_fix(writer, capture)
        writer.command(f"w {12 * 4096} 6")
        writer.command(f"w {16 * 4096} 6")
        captured = Captured()
        drain(capture, captured)
        capture.finish()
        drain(capture, captured)
        capture.check()
        assert captured.pages[12 * 4096] in (None, bytes(4096))
        page = captured.pages[16 * 4096]
        assert page is not None
        assert page[:8] == struct.pack("<Q", 5)


def test_ram_dropped_after_its_copy_is_nobodys_business() -> None:
    with start("private", IDLE) as writer, armed(writer) as capture:
        stop_and_fix(writer, capture)
        captured = Captured()
        drain(capture, captured)
        writer.drop("d", 0, MIB)
        capture.finish()
        drain(capture, captured)
        capture.check()
        assert_one_instant(writer, captured)


@pytest.mark.parametrize("kind", ["private", "shared"])
def test_a_dropped_page_read_beside_other_faults_is_never_taken_for_zeroes(kind: str) -> None:
    """The sweep may copy a page between the drop and the handling of its event."""
    silent = failed = 0
    with start(kind, FULL_SPEED) as writer:
        for _ in range(15):
            captured = Captured()
            with armed(writer) as capture:
                stop_and_fix(writer, capture)
                sweep = threading.Thread(target=drain, args=(capture, captured))
                sweep.start()
                for offset in range(0, 4 * MIB, 256 << 10):
                    writer.drop("d" if kind == "private" else "m", offset, 16 << 10)
                sweep.join()
                capture.finish()
                drain(capture, captured)
                try:
                    capture.check()
                except SnapshotFailed:
                    failed += 1
                    continue
            silent += captured.is_torn(writer.written_bytes, writer.block.page_size_bytes)
    assert silent == 0
    assert failed == 0, "something was dropped that was not saved before"


# --- the process goes, or we go -------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["private", "shared"])
def test_the_process_exits_midway(kind: str) -> None:
    with start(kind, IDLE) as writer, armed(writer) as capture:
        stop_and_fix(writer, capture)
        worker = capture.worker(SECTION_ID)
        assert worker.next()
        writer.exit_now()
        while worker.next():
            pass
        with pytest.raises(MachineError, match="exited"):
            capture.check()


@pytest.mark.parametrize("kind", ["private", "shared", "hugetlb"])
@pytest.mark.parametrize("stage", ["registered", "armed", "stopped", "hold", "active", "swept"])
def test_release_at_any_stage_leaves_the_process_running(kind: str, stage: str) -> None:
    with start(kind, FULL_SPEED) as writer:
        with armed(writer, arm=stage != "registered", spill_bytes=4 * MIB) as capture:
            if stage == "stopped":
                writer.command("p")
                capture.protect_written()
            elif stage == "hold":
                capture._core.set_phase(_capture.PHASE_HOLD)
            elif stage in ("active", "swept"):
                stop_and_fix(writer, capture)
                time.sleep(0.05)
                if stage == "swept":
                    drain(capture, Captured())
            began = time.monotonic()
            capture.release()
            assert time.monotonic() - began < PROMPT_S
            if stage == "stopped":
                writer.command("c")
            assert writer.runs()
        assert_one_instant(writer, take(writer))


def test_an_event_while_faults_are_held_stands_in_nobodys_way() -> None:
    """In the moment before cont the fault thread serves nothing, but must read events: the
    kernel protects nothing while one is unread."""
    with start("private", FULL_SPEED) as writer, armed(writer) as capture:
        capture._core.set_phase(_capture.PHASE_HOLD)
        time.sleep(0.05)
        writer.drop("d", writer.block.used_length_bytes - 4096, 4096)
        assert capture.protect_written() >= 0
        capture._core.set_phase(_capture.PHASE_ACTIVE)
        with pytest.raises(SnapshotFailed):
            capture.check()


@pytest.mark.parametrize("stage", STAGES)
@pytest.mark.parametrize("kind", ["private", "shared"])
def test_kill_9_of_the_capturing_process(kind: str, stage: str) -> None:
    chance = random.Random(f"{kind} {stage}")
    with start(kind, FULL_SPEED) as writer:
        for _ in range(4):
            child = subprocess.Popen(
                [
                    sys.executable,
                    "-m",
                    "tests.support.capture_child",
                    str(writer.pid),
                    msgspec.json.encode(writer.block).decode(),
                ],
                stdout=subprocess.PIPE,
                text=True,
                cwd=_ROOT,
            )
            try:
                assert child.stdout is not None
                for line in child.stdout:
                    if line.strip() == stage:
                        break
                else:
                    pytest.fail("the capturing process ended by itself")
                time.sleep(chance.random() ** 3 * 0.02)
            finally:
                child.kill()
                child.wait(timeout=60)
                if child.stdout is not None:
                    child.stdout.close()
            began = time.monotonic()
            assert writer.runs(), f"the guest stands still after a death in {stage}"
            assert time.monotonic() - began < PROMPT_S
        assert_one_instant(writer, take(writer))
