"""Captures and tracking of this process's own RAM, with each kind of protection."""

from __future__ import annotations

import ctypes
import errno
import fcntl
import os
import random
import struct
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path

import pytest

from stillframe.board.memory.guest_ram import GuestRam
from stillframe.capture import ram_capture, signal_protection
from stillframe.capture.ram_capture import RamCapture
from stillframe.capture.signal_protection import SignalProtection, chunk_bytes
from stillframe.errors import BusyError, HostError, SnapshotFailed
from stillframe.model import ProtectionKind, StoppedWrite
from tests.support.own_writer import OwnWriter, capturing, take_own, write_words
from tests.support.waiting import wait_until
from tests.support.writer_process import Captured, drain

PAGE = 4096
CHUNK = 64 << 10
MIB = 1 << 20
_UFFDIO_WRITEPROTECT = 0xC018AA06
KINDS: tuple[ProtectionKind, ...] = ("userfaultfd", "userfaultfd-user", "mprotect")
each_kind = pytest.mark.parametrize("kind", KINDS)


@contextmanager
def blocks(*lengths_bytes: int) -> Iterator[list[GuestRam]]:
    with ExitStack() as stack:
        rams = [GuestRam(f"ram{n}", length) for n, length in enumerate(lengths_bytes)]
        for ram in rams:
            stack.callback(ram.close)
        yield rams


@contextmanager
def written(*lengths_bytes: int, pause_us: int = 0) -> Iterator[list[OwnWriter]]:
    with blocks(*lengths_bytes) as rams, ExitStack() as stack:
        yield [stack.enter_context(OwnWriter(ram, pause_us=pause_us)) for ram in rams]


def moves(writer: OwnWriter) -> bool:
    before = writer.pages
    deadline = time.monotonic() + 60
    while writer.pages == before and time.monotonic() < deadline:
        time.sleep(0.001)
    return writer.pages > before


def assert_one_instant(writer: OwnWriter, captured: Captured) -> None:
    assert not captured.repeated
    assert sorted(captured.pages) == list(range(0, writer.ram.length_bytes, PAGE))
    assert not captured.is_torn(writer.written_bytes, PAGE)


# --- one instant -----------------------------------------------------------------------------


@each_kind
@pytest.mark.parametrize("pause_us", [0, 20])
def test_never_torn_in_our_own_process(kind: ProtectionKind, pause_us: int) -> None:
    """Two writers; the lengths are no whole chunks, and the last quarter is a hole."""
    with written(8 * MIB + 5 * PAGE, 3 * MIB - PAGE, pause_us=pause_us) as writers:
        for _ in range(8):
            for writer, captured in zip(writers, take_own(kind, writers), strict=True):
                assert_one_instant(writer, captured)
                assert captured.writes == ()
        assert all(moves(writer) for writer in writers)


class Unprotected(RamCapture):
    """The control: un-protected right after the instant, nothing is copied first."""

    def instant(self) -> tuple[StoppedWrite, ...]:
        writes = super().instant()
        assert self._protection is not None
        for index, block in enumerate(self._blocks):
            if self._protection.kind == "mprotect":
                assert self._core.unregister(index, 0, block.pages) == 0
            else:
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
@each_kind
def test_control_without_protection_our_own_capture_is_torn(
    kind: ProtectionKind, broken: type[RamCapture]
) -> None:
    with written(8 * MIB) as writers:
        for _ in range(100):  # on a busy host the sweep may be over before a writer goes on
            captured = take_own(kind, writers, make=broken)[0]
            if captured.is_torn(writers[0].written_bytes, PAGE):
                return
        pytest.fail("no snapshot was torn")


@each_kind
def test_holes_of_our_own_ram_are_zero_and_stay_holes(kind: ProtectionKind) -> None:
    """One page in each chunk of the first MiB, then nothing."""
    with blocks(16 * MIB) as (ram,):
        for offset in range(0, MIB, CHUNK):
            ram.write(offset + 3 * PAGE, b"data")
        before = os.fstat(ram.fd).st_blocks
        captured = Captured()
        with capturing(kind, [ram]) as capture:
            capture.arm()
            capture.protect_written()
            capture.instant()
            ram.write(8 * MIB, b"late")
            drain(capture, {ram.idstr: captured})
            capture.finish()
            drain(capture, {ram.idstr: captured})
            capture.check()
            numbers = capture.statistics()
        assert os.fstat(ram.fd).st_blocks == before + PAGE // 512
        full = {at for at, page in captured.pages.items() if page is not None}
        assert full == {offset + 3 * PAGE for offset in range(0, MIB, CHUNK)}
        assert len(captured.pages) == 16 * MIB // PAGE
        assert numbers["pages_data"] == 16
        assert numbers["pages_never_populated"] >= 14 * MIB // PAGE


@each_kind
def test_a_full_spill_makes_writers_wait_and_loses_nothing(kind: ProtectionKind) -> None:
    with written(8 * MIB) as (writer,), ExitStack() as stack:
        capture = stack.enter_context(capturing(kind, [writer.ram], spill_bytes=2 * MIB))
        captured = Captured()
        capture.arm()
        writer.pause()
        capture.protect_written()
        capture.instant()
        writer.go_on()
        wait_until(lambda: capture.statistics()["stalls"])
        waiting = writer.pages
        time.sleep(0.1)
        assert writer.pages == waiting, "it did not wait"
        drain(capture, {writer.ram.idstr: captured})
        capture.finish()
        drain(capture, {writer.ram.idstr: captured})
        capture.check()
        assert_one_instant(writer, captured)
        assert moves(writer)


@each_kind
@pytest.mark.parametrize("stage", ["registered", "armed", "hold", "active", "swept"])
def test_release_at_any_stage_lets_our_own_writers_go(kind: ProtectionKind, stage: str) -> None:
    took_s: list[float] = []
    with written(4 * MIB, 2 * MIB) as writers:
        rams = [writer.ram for writer in writers]
        for _ in range(3):  # others on the host may take the time of any one
            with capturing(kind, rams, spill_bytes=2 * MIB) as capture:
                if stage != "registered":
                    capture.arm()
                if stage == "hold":
                    capture._core.set_phase(ram_capture._capture.PHASE_HOLD)
                if stage in ("active", "swept"):
                    capture.instant()
                if stage == "swept":
                    drain(capture, {ram.idstr: Captured() for ram in rams})
                began = time.monotonic()
                capture.release()
                took_s.append(time.monotonic() - began)
                assert all(moves(writer) for writer in writers)
            assert all(moves(writer) for writer in writers)
    assert min(took_s) < 1


def test_releases_race_with_the_faults_of_many_threads() -> None:
    """A fault on its way to the handler when its range is given up is nobody's error."""
    with written(MIB, MIB, MIB, MIB) as writers:
        rams = [writer.ram for writer in writers]
        for n in range(150):
            with capturing("mprotect", rams, spill_bytes=2 * MIB) as capture:
                capture.arm()
                if n % 3 == 1:
                    capture.instant()
                if n % 3 == 2:
                    capture.close()  # without a release before
        assert all(moves(writer) for writer in writers)


@each_kind
def test_whoever_waits_for_a_page_is_woken_when_it_is_free(kind: ProtectionKind) -> None:
    """Else a thread would only go on when its patience ends (a second, with mprotect), 64 times."""
    with blocks(16 * MIB) as (ram,), capturing(kind, [ram]) as capture:
        ram.touch(0, 16 * MIB)
        capture.arm()
        capture.instant()
        began = time.monotonic()
        write_words(ram, range(0, 16 * MIB, 4 * CHUNK), 1)
        assert time.monotonic() - began < 40
        assert capture.statistics()["faults"] == 16 * MIB // (4 * CHUNK)


# --- writes by the kernel ---------------------------------------------------------------------


@each_kind
def test_the_kernel_reads_into_protected_ram(kind: ProtectionKind) -> None:
    """All the bytes come, and the snapshot has what was there before."""
    old, new = b"old!" * (MIB // 4), os.urandom(MIB)
    with blocks(2 * MIB) as (ram,):
        ram.write(PAGE - 5, old)
        file = os.memfd_create("disk")
        os.pwrite(file, new, 100)
        captured = Captured()
        with capturing(kind, [ram]) as capture:
            capture.arm()
            capture.instant()
            assert ram.read_from(file, PAGE - 5, MIB, 100) == MIB
            assert ram.read(PAGE - 5, MIB) == new
            drain(capture, {ram.idstr: captured})
            capture.finish()
            drain(capture, {ram.idstr: captured})
            capture.check()
        os.close(file)
        content = b"".join(captured.pages[at] or bytes(PAGE) for at in range(0, 2 * MIB, PAGE))
        assert content == bytes(PAGE - 5) + old + bytes(MIB - PAGE + 5)


@each_kind
def test_a_stream_is_read_into_protected_ram(kind: ProtectionKind) -> None:
    with blocks(MIB) as (ram,):
        reader, writer = os.pipe()
        with capturing(kind, [ram]) as capture:
            capture.arm()
            os.write(writer, b"abc" * 10000)
            assert ram.read_from(reader, 10, MIB - 10) > 0
            capture.take_written()
            os.write(writer, b"defg")
            at = 0
            while (got := ram.read_from(reader, MIB // 2 + at, 100)) and at + got < 4:
                at += got
        os.close(reader)
        os.close(writer)


@pytest.mark.parametrize("kind", KINDS[1:])
def test_a_plain_read_would_fail(kind: ProtectionKind) -> None:
    """The control of the tests above: the kernel does not wait with these protections."""
    libc = ctypes.CDLL(None, use_errno=True)
    libc.pread.argtypes = [ctypes.c_int, ctypes.c_void_p, ctypes.c_size_t, ctypes.c_long]
    with blocks(MIB) as (ram,):
        file = os.open(__file__, os.O_RDONLY)
        with capturing(kind, [ram]) as capture:
            capture.arm()
            assert libc.pread(file, ram.hva, 100, 0) == -1
            assert ctypes.get_errno() == errno.EFAULT
            assert capture.take_written() == []
        os.close(file)


# --- tracking ------------------------------------------------------------------------------------


@each_kind
def test_every_write_is_in_one_of_the_rounds(kind: ProtectionKind) -> None:
    """A copy that is brought up to date in rounds is equal at the end, as in precopy."""
    chance = random.Random(7)
    with blocks(4 * MIB, MIB + 3 * PAGE) as rams, ExitStack() as stack:
        capture = stack.enter_context(capturing(kind, rams))
        capture.arm()
        copies = [bytearray(ram.read(0, ram.length_bytes)) for ram in rams]

        def synchronise() -> int:
            pages = 0
            for index, first, count in capture.take_written():
                start, end = first * PAGE, (first + count) * PAGE
                assert end <= rams[index].length_bytes
                copies[index][start:end] = rams[index].read(start, end - start)
                pages += count
            return pages

        with OwnWriter(rams[0]) as writer:
            for n in range(40):
                offsets = [
                    chance.randrange(rams[1].length_bytes // 8) * 8
                    for _ in range(chance.randrange(30))
                ]
                write_words(rams[1], offsets, n)
                synchronise()
                assert copies[1] == rams[1].read(0, rams[1].length_bytes)
            writer.pause()
            synchronise()
            assert copies[0] == rams[0].read(0, rams[0].length_bytes)
            assert synchronise() == 0


@each_kind
def test_what_was_not_written_is_in_no_round(kind: ProtectionKind) -> None:
    with blocks(4 * MIB) as (ram,), capturing(kind, [ram]) as capture:
        ram.touch(0, 4 * MIB)
        capture.arm()
        assert capture.take_written() == []
        write_words(ram, [2 * MIB + 70 * PAGE], 1)
        write_words(ram, [PAGE], 1)
        # Un-protected, and so told, in pieces of 64 KiB.
        assert capture.take_written() == [(0, 0, 16), (0, 2 * MIB // PAGE + 64, 16)]
        ram.read(0, 4 * MIB)
        assert capture.take_written() == []


@each_kind
def test_ram_of_odd_length_is_tracked_to_its_end(kind: ProtectionKind) -> None:
    with blocks(MIB + PAGE) as (ram,), capturing(kind, [ram]) as capture:
        capture.arm()
        write_words(ram, [MIB + 8], 1)
        assert capture.take_written() == [(0, MIB // PAGE, 1)]


def test_a_thread_that_writes_while_rounds_are_taken_is_never_missed() -> None:
    """Rounds as fast as they can be, so that protecting and un-protecting race."""
    with blocks(MIB) as (ram,), capturing("mprotect", [ram]) as capture:
        capture.arm()
        copy = bytearray(ram.read(0, MIB))
        rounds = 0
        with OwnWriter(ram) as writer:
            deadline = time.monotonic() + 1
            while time.monotonic() < deadline or rounds <= 10:
                for _, first, count in capture.take_written():
                    start, end = first * PAGE, (first + count) * PAGE
                    copy[start:end] = ram.read(start, end - start)
                rounds += 1
            assert moves(writer)
            writer.pause()
            for _, first, count in capture.take_written():
                start, end = first * PAGE, (first + count) * PAGE
                copy[start:end] = ram.read(start, end - start)
            assert copy == ram.read(0, MIB)
        assert rounds > 10


# --- what cannot be -------------------------------------------------------------------------------


@each_kind
def test_ram_is_captured_once_at_a_time(kind: ProtectionKind) -> None:
    with blocks(MIB) as (ram,), capturing(kind, [ram]):
        with pytest.raises(BusyError, match="another"), capturing(kind, [ram]):
            pass
        ram.write(0, b"still writable")


@each_kind
def test_clearing_ram_under_capture_fails_the_snapshot(kind: ProtectionKind) -> None:
    with blocks(2 * MIB) as (ram,), capturing(kind, [ram]) as capture:
        ram.touch(0, 2 * MIB)
        capture.arm()
        capture.instant()
        ram.clear(MIB, 8 * PAGE)
        drain(capture, {ram.idstr: Captured()})
        with pytest.raises(SnapshotFailed, match="punched"):
            capture.check()


def test_scattered_writes_stay_within_the_limit_of_mappings() -> None:
    """Every second chunk of 2 GiB un-protected: each is a mapping of its own."""
    ram_bytes = 2048 * MIB
    chunk = chunk_bytes(ram_bytes)
    with blocks(ram_bytes) as (ram,), capturing("mprotect", [ram]) as capture:
        capture.arm()
        write_words(ram, range(0, ram_bytes, 2 * chunk), 1)
        maps = Path("/proc/self/maps").read_text().count("\n")
        assert ram_bytes // chunk <= maps < 25000
        assert len(capture.take_written()) == ram_bytes // chunk // 2
        capture.check()


def test_a_small_block_beside_a_large_one_ends_where_it_is_mapped() -> None:
    """The large one wants chunks for which the small one has no room at its end."""
    with blocks(2048 * MIB, 3 * PAGE, CHUNK) as rams, capturing("mprotect", rams) as capture:
        large, small = capture._blocks[0], capture._blocks[1]
        assert large.page_size_bytes > small.page_size_bytes == CHUNK
        capture.arm()
        for ram in rams:
            write_words(ram, [0], 1)
        assert capture.take_written() == [(0, 0, 2 * CHUNK // PAGE), (1, 0, 3), (2, 0, 16)]


@pytest.mark.parametrize(
    ("ram_bytes", "chunk"),
    [(MIB, CHUNK), (1000 * MIB, CHUNK), (2048 * MIB, 2 * CHUNK), (1 << 40, 64 * MIB)],
)
def test_chunks_grow_with_ram(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, ram_bytes: int, chunk: int
) -> None:
    limit = tmp_path / "max_map_count"
    limit.write_text("65530\n")
    monkeypatch.setattr(signal_protection, "_MAX_MAP_COUNT", limit)
    assert chunk_bytes(ram_bytes) == chunk
    limit.unlink()
    assert chunk_bytes(ram_bytes) == chunk


def test_the_table_of_ranges_ends() -> None:
    protection = SignalProtection()
    with blocks(*[PAGE] * 65) as rams:
        for ram in rams[:64]:
            protection.register(ram.hva, PAGE)
        with pytest.raises(HostError, match="cannot be write-protected"):
            protection.register(rams[64].hva, PAGE)
        protection.close()
        protection.close()
