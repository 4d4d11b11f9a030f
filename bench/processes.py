"""Memory, written bytes and CPU time of other processes, from /proc (proc(5))."""

from __future__ import annotations

import contextlib
import os
import subprocess
import tempfile
import threading
import time
from collections.abc import Sequence
from pathlib import Path

import msgspec

from stillframe.errors import MachineError

_SAMPLE_S = 0.02


def status_bytes(pid: int, field: str) -> int:
    """Read a size from /proc/PID/status (``VmRSS``, ``VmHWM``), bytes; 0 if it is not there."""
    with contextlib.suppress(OSError):
        for line in Path(f"/proc/{pid}/status").read_text().splitlines():
            if line.startswith(f"{field}:"):
                return int(line.split()[1]) * 1024
    return 0


def reset_peak(pid: int) -> None:
    """Reset a process's VmHWM to its VmRSS (proc_pid_clear_refs(5), value 5)."""
    Path(f"/proc/{pid}/clear_refs").write_text("5")


def written_bytes(pid: int) -> int:
    """Return the bytes that the process and its reaped children caused to be written to disk."""
    for line in Path(f"/proc/{pid}/io").read_text().splitlines():
        if line.startswith("write_bytes:"):
            return int(line.split()[1])
    return 0


def children(pid: int) -> list[int]:
    """Return a process's current children, of all its threads."""
    found: list[int] = []
    with contextlib.suppress(OSError):
        for task in Path(f"/proc/{pid}/task").iterdir():
            with contextlib.suppress(OSError):
                found += [int(child) for child in (task / "children").read_text().split()]
    return found


class PeakSampler:
    """A sampler of the peak memory of a process's descendants, and with ``itself`` of the process.

    It sums each process's own peak (VmHWM, kept by the kernel), so the sum is an upper bound.
    """

    def __init__(self, pid: int, *, itself: bool) -> None:
        self._pid = pid
        self._itself = itself
        self._peaks: dict[int, int] = {}
        self._end = threading.Event()
        self._thread = threading.Thread(target=self._run, name="peak", daemon=True)
        self._thread.start()

    def _run(self) -> None:
        while not self._end.wait(_SAMPLE_S):
            self._sample(self._pid, self._itself, 3)

    def _sample(self, pid: int, counts: bool, depth: int) -> None:
        if counts:
            self._peaks[pid] = max(self._peaks.get(pid, 0), status_bytes(pid, "VmHWM"))
        if depth:
            for child in children(pid):
                self._sample(child, True, depth - 1)

    def stop_bytes(self) -> int:
        """End the sampling; return the sum of all peaks, bytes."""
        self._end.set()
        self._thread.join()
        return sum(self._peaks.values())


class Finished(msgspec.Struct, frozen=True, kw_only=True):
    """A program that has ended. Times are on our monotonic clock; ``cpu_s`` includes children."""

    started_s: float
    ended_s: float
    output: bytes
    cpu_s: float
    peak_bytes: int
    written_bytes: int


def run_program(command: Sequence[str], *, timeout_s: float) -> Finished:
    """Run a program as a user would, and measure it.

    Raises:
        MachineError: it failed, or took too long and was killed.
    """
    with tempfile.TemporaryFile() as output, tempfile.TemporaryFile() as complaints:
        started_s = time.monotonic()
        process = subprocess.Popen(
            command, stdin=subprocess.DEVNULL, stdout=output, stderr=complaints
        )
        sampler = PeakSampler(process.pid, itself=True)
        killer = threading.Timer(timeout_s, process.kill)
        killer.start()
        # Keep it a zombie for a moment: its numbers in /proc are then final, and still there.
        os.waitid(os.P_PID, process.pid, os.WEXITED | os.WNOWAIT)
        ended_s = time.monotonic()
        killer.cancel()
        killer.join()
        peak = sampler.stop_bytes()
        written = written_bytes(process.pid)
        _, status, usage = os.wait4(process.pid, 0)
        process.returncode = os.waitstatus_to_exitcode(status)
        output.seek(0)
        complaints.seek(0)
        said = output.read()
        words = (complaints.read() or said).decode(errors="replace").strip().splitlines()
    if process.returncode != 0:
        raise MachineError(
            f"{' '.join(command[:4])} ended with {process.returncode}",
            why=words[-1] if words else None,
        )
    return Finished(
        started_s=started_s,
        ended_s=ended_s,
        output=said,
        cpu_s=usage.ru_utime + usage.ru_stime,
        peak_bytes=peak,
        written_bytes=written,
    )
