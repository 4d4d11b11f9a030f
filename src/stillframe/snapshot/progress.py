"""Turns the capture's counters into a job's statistics."""

from __future__ import annotations

import time
from typing import Any

from stillframe.memory.ram_capture import RamCapture
from stillframe.model import (
    Downtime,
    JobState,
    PageCounts,
    ProtectionKind,
    Statistics,
    StoppedWrite,
)
from stillframe.snapshot.pace import Pace
from stillframe.store.writer import SnapshotWriter

_TARGET_PAGE_BYTES = 4096


class Progress:
    """Collects what a job knows; ``statistics`` may be called from any thread."""

    def __init__(self) -> None:
        self.state: JobState = "none"
        self.phase = "none"
        self.downtime = Downtime()
        self.downtime_ms = 0.0
        self.arm_ms = 0.0
        self.total_ms = 0.0
        self.ram_bytes = 0
        self.file_bytes = 0
        self.protection: ProtectionKind | None = None
        self.writes_while_stopped: tuple[StoppedWrite, ...] = ()
        self.ram: RamCapture | None = None
        self.writer: SnapshotWriter | None = None
        self._began = time.monotonic()
        self._pace: Pace | None = None
        self._last: dict[str, Any] = {}

    def begin(self, state: JobState, phase: str) -> None:
        """Enter a phase."""
        self.state = state
        self.phase = phase
        if phase == "saving":
            self._pace = Pace()

    def keep(self) -> None:
        """Keep the capture's last numbers; it is about to be closed."""
        if self.ram is not None:
            self._last = self.ram.statistics() | {"spill_limit_bytes": self.ram.spill_bytes}
            self.ram = None
        if self.writer is not None:
            self.file_bytes = self.writer.file_bytes
            if self.state in ("completed", "failed", "cancelled"):
                self.writer = None  # it holds the whole index
        self.total_ms = (time.monotonic() - self._began) * 1e3

    def statistics(self) -> Statistics:
        """The numbers now."""
        ram, writer = self.ram, self.writer
        numbers = self._last
        if ram is not None:
            numbers = ram.statistics() | {"spill_limit_bytes": ram.spill_bytes}
        done_bytes = int(numbers.get("pages_done", 0)) * _TARGET_PAGE_BYTES
        file_bytes = writer.file_bytes if writer is not None else self.file_bytes
        rate, eta_s = self._rate(numbers, file_bytes)
        zero, data = int(numbers.get("pages_zero", 0)), int(numbers.get("pages_data", 0))
        return Statistics(
            state=self.state,
            phase=self.phase,
            downtime_ms=self.downtime_ms,
            downtime=self.downtime,
            arm_ms=self.arm_ms,
            total_ms=self.total_ms or (time.monotonic() - self._began) * 1e3,
            ram_bytes=self.ram_bytes,
            ram_done_bytes=done_bytes,
            file_bytes=file_bytes,
            pages=PageCounts(
                total=zero + data,
                zero=zero,
                data=data,
                faulted=int(numbers.get("pages_faulted", 0)),
                never_populated=int(numbers.get("pages_never_populated", 0)),
            ),
            faults=int(numbers.get("faults", 0)),
            fault_p50_us=float(numbers.get("fault_p50_us", 0.0)),
            fault_p99_us=float(numbers.get("fault_p99_us", 0.0)),
            fault_max_us=float(numbers.get("fault_max_us", 0.0)),
            stall_ms=float(numbers.get("stall_ms", 0.0)),
            spill_limit_bytes=int(numbers.get("spill_limit_bytes", 0)),
            spill_used_bytes=int(numbers.get("spill_used_bytes", 0)),
            spill_peak_bytes=int(numbers.get("spill_peak_bytes", 0)),
            rate_bytes_per_s=rate,
            eta_s=eta_s,
            protection=self.protection,
            writes_while_stopped=self.writes_while_stopped,
        )

    def _rate(self, numbers: dict[str, Any], file_bytes: int) -> tuple[float, float | None]:
        """Bytes per second to the destination, and the seconds left, if that can be told."""
        if self._pace is None or self.state != "active":
            return 0.0, None
        # Of what has left: pages that were saved first may wait in the spill for long.
        done = int(numbers.get("pages_data", 0)) + int(numbers.get("pages_zero", 0))
        done -= int(numbers.get("pages_never_populated", 0))
        rate, written = self._pace.note(done * _TARGET_PAGE_BYTES, file_bytes)
        populated = numbers.get("pages_populated")
        if rate <= 0 or populated is None:
            return written, None
        return written, max(0, int(populated) - done) * _TARGET_PAGE_BYTES / rate
