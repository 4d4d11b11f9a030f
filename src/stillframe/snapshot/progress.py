"""A job's statistics, computed from the capture's counters."""

from __future__ import annotations

import time
from typing import Any

from stillframe.capture.ram_capture import RamCapture
from stillframe.model import (
    TARGET_PAGE_BYTES,
    Downtime,
    JobState,
    PageCounts,
    ProtectionKind,
    Statistics,
    StoppedWrite,
)
from stillframe.snapshot.comparison import Comparison
from stillframe.snapshot.job_state import StateMachine
from stillframe.snapshot.output import Output
from stillframe.snapshot.rate import RateMeter

_SPAN_S = 5.0
_TOO_EARLY_S = 0.999
"""The rate in the first second does not predict the time left."""


class Progress:
    """The numbers of one job; ``statistics`` may be called from any thread."""

    def __init__(self, states: StateMachine) -> None:
        self._states = states
        self.phase = "none"
        self.downtime = Downtime()
        self.downtime_ms = 0.0
        self.arm_ms = 0.0
        self.total_ms = 0.0
        self.ram_bytes = 0
        self.file_bytes = 0
        self.protection: ProtectionKind | None = None
        self.writes_while_stopped: tuple[StoppedWrite, ...] = ()
        self.disks = ""
        self.disk_bytes = 0
        self.disk_done_bytes = 0
        self.ram: RamCapture | None = None
        self.output: Output | None = None
        self.comparison: Comparison | None = None
        self._began = time.monotonic()
        self._pace: RateMeter | None = None
        self._last: dict[str, Any] = {}

    def begin(self, phase: str) -> None:
        """Enter a phase."""
        self.phase = phase
        if phase == "saving":
            self._pace = RateMeter(_SPAN_S)

    def end(self, state: JobState) -> None:
        """Keep the final numbers; the job has ended."""
        self.phase = state
        self.keep()
        self.output = None  # it holds the whole index

    def saved_elsewhere(self, data_pages: int, zero_pages: int) -> None:
        """Set the page counts of a snapshot whose RAM the VMM saved itself."""
        self._last = {"pages_data": data_pages, "pages_zero": zero_pages}

    def keep(self) -> None:
        """Keep the capture's last numbers, before it is closed."""
        if self.ram is not None:
            self._last = self.ram.statistics() | {"spill_limit_bytes": self.ram.spill_bytes}
            self.ram = None
        if self.output is not None:
            self.file_bytes = self.output.file_bytes
        self.total_ms = (time.monotonic() - self._began) * 1e3

    def statistics(self) -> Statistics:
        """Return the current numbers."""
        ram, output = self.ram, self.output
        numbers = self._last
        if ram is not None:
            numbers = ram.statistics() | {"spill_limit_bytes": ram.spill_bytes}
        unchanged = int(numbers.get("pages_unchanged", 0))
        done_bytes = (int(numbers.get("pages_done", 0)) + unchanged) * TARGET_PAGE_BYTES
        file_bytes = output.file_bytes if output is not None else self.file_bytes
        rate, eta_s = self._rate(numbers, file_bytes)
        zero, data = int(numbers.get("pages_zero", 0)), int(numbers.get("pages_data", 0))
        if self.comparison is not None:
            alike_zero, alike_data = self.comparison.zero_pages, self.comparison.data_pages
            zero, data = zero - alike_zero, data - alike_data
            unchanged += alike_zero + alike_data
        return Statistics(
            state=self._states.value,
            phase=self.phase,
            downtime_ms=self.downtime_ms,
            downtime=self.downtime,
            arm_ms=self.arm_ms,
            total_ms=self.total_ms or (time.monotonic() - self._began) * 1e3,
            ram_bytes=self.ram_bytes,
            ram_done_bytes=done_bytes,
            file_bytes=file_bytes,
            pages=PageCounts(
                total=zero + data + unchanged,
                zero=zero,
                data=data,
                faulted=int(numbers.get("pages_faulted", 0)),
                never_populated=int(numbers.get("pages_never_populated", 0)),
                unchanged=unchanged,
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
            disks=self.disks,
            disk_bytes=self.disk_bytes,
            disk_done_bytes=self.disk_done_bytes,
        )

    def _rate(self, numbers: dict[str, Any], file_bytes: int) -> tuple[float, float | None]:
        """Return bytes per second to the destination, and the seconds left if known.

        Pages that were never populated are skipped at no cost, so they do not count: they would
        make a slow job look fast at first, and endless later.
        """
        if self._pace is None or self._states.value != "active":
            return 0.0, None
        # Count pages that have left the spill: saved ones may stay in it for long.
        done = int(numbers.get("pages_data", 0)) + int(numbers.get("pages_zero", 0))
        done -= int(numbers.get("pages_never_populated", 0))
        self._pace.note(done * TARGET_PAGE_BYTES, file_bytes)
        if self._pace.covered_s < _TOO_EARLY_S:
            return 0.0, None
        rate, written = self._pace.rates()
        populated = numbers.get("pages_populated")
        if rate <= 0 or populated is None:
            return written, None
        left = max(0, min(int(populated), int(numbers["pages_wanted"])) - done)
        return written, left * TARGET_PAGE_BYTES / rate
