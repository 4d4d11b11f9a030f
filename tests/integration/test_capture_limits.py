"""The capture core at its limits: no memory for the spill, phases that flip, much RAM."""

from __future__ import annotations

import contextlib
import resource
import time
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from stillframe.capture import _capture, new_core, ram_capture
from stillframe.capture.ram_capture import RamCapture
from stillframe.errors import HostError
from tests.support.probes import has_uffd_wp
from tests.support.waiting import wait_until
from tests.support.writer_process import (
    FULL_SPEED,
    IDLE,
    SECTION_ID,
    Captured,
    WriterProcess,
    add_section,
    armed,
    drain,
    stop_and_fix,
)

MIB = 1 << 20


@pytest.fixture(autouse=True)
def _needs_uffd() -> None:
    has_uffd_wp().require()


@contextlib.contextmanager
def no_more_memory() -> Iterator[None]:
    """As on a host without overcommit that is full: mmap fails in this process."""
    before = resource.getrlimit(resource.RLIMIT_AS)
    pages = int(Path("/proc/self/statm").read_text().split()[0])
    resource.setrlimit(resource.RLIMIT_AS, (pages * resource.getpagesize(), before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_AS, before)


class Starved(RamCapture):
    """There was memory for two slabs, and will be for no more."""

    def __init__(self, *arguments: Any, **options: Any) -> None:
        super().__init__(*arguments, **options)
        with no_more_memory():
            assert self._core.grow_spill(1) == 2


def test_a_spill_that_cannot_grow_is_drained_as_a_small_one(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(new_core, "FIRST_SPILL_BYTES", 2 * MIB)
    with (
        WriterProcess("private", 64, FULL_SPEED) as writer,
        armed(writer, spill_bytes=64 * MIB, kind=Starved) as capture,
    ):
        stop_and_fix(writer, capture)
        wait_until(lambda: capture.statistics()["stalls"], "the guest did not wait")
        waiting = writer.command().written_pages
        time.sleep(0.2)
        assert writer.command().written_pages == waiting, "the guest did not wait"
        captured = Captured()
        worker = capture.worker(SECTION_ID)
        for _ in range(2):  # of 64 that the sweep would make of it
            assert worker.next()
            add_section(bytes(worker.raw), {"pc.ram": captured})
        wait_until(
            lambda: writer.command().written_pages > waiting, "the guest waits for the sweep"
        )
        drain(capture, captured)
        capture.finish()
        drain(capture, captured)
        capture.check()
        assert not captured.repeated
        assert not captured.is_torn(writer.written_bytes, 4096)


def test_no_memory_at_all_is_an_error_before_the_guest_is_touched() -> None:
    with WriterProcess("private", 16, FULL_SPEED) as writer:
        with no_more_memory(), pytest.raises(HostError, match="no memory") as caught:
            RamCapture(None, writer.pid, [writer.block], spill_bytes=64 * MIB)
        assert caught.value.guest_state == "running"
        assert writer.runs()


def test_while_faults_are_held_none_is_served() -> None:
    """The phase is read once per fault: else one that was let in while armed could be served
    as one of after the instant, before writes that came earlier were noted."""
    with WriterProcess("private", 16, FULL_SPEED) as writer, armed(writer) as capture:
        core = capture._core
        deadline = time.monotonic() + 4
        while time.monotonic() < deadline or capture.statistics()["armed_faults"] <= 500:
            assert time.monotonic() < deadline + 60, "there were hardly any faults"
            core.set_phase(_capture.PHASE_HOLD)
            core.set_phase(_capture.PHASE_ARMED)
            core.protect_noted()
        numbers = capture.statistics()
        assert numbers["pages_done"] == 0


class CountingCore:
    """Counts the calls of a core's methods."""

    def __init__(self, core: _capture.Capture) -> None:
        self._core = core
        self.calls: Counter[str] = Counter()

    def __getattr__(self, name: str) -> Any:
        self.calls[name] += 1
        return getattr(self._core, name)


def test_what_walks_all_of_ram_is_not_done_in_each_step(monkeypatch: pytest.MonkeyPatch) -> None:
    """Else arming and a migration's batches would cost the square of RAM."""
    monkeypatch.setattr(ram_capture, "_PROTECT_STEP_BYTES", MIB)
    with (
        WriterProcess("private", 16, IDLE) as writer,
        armed(writer, arm=False) as capture,
        pytest.MonkeyPatch.context() as patch,
    ):
        core = CountingCore(capture._core)
        patch.setattr(capture, "_core", core)
        capture.arm()
        assert core.calls["protect"] == 16
        assert core.calls["statistics"] == 0
        assert core.calls["populated_pages"] == 1
        capture.instant()
        for _ in range(10):
            capture.check()
            assert capture.statistics()["pages_populated"]
        assert core.calls["populated_pages"] == 1
