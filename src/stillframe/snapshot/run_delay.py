"""Scheduling of encoders behind the guest's vCPUs.

Nice values alone are not enough: with autogroup or cgroups they count only within a session or
group, and the VM is in another one. So the extra encoders measure how long the VMM's threads wait
for a CPU, and rest while that wait grows. Source: Linux
``Documentation/scheduler/sched-stats.rst`` (schedstat: run delay), sched(7).
"""

from __future__ import annotations

import contextlib
import ctypes
import os
import struct
import threading
import time
from pathlib import Path

_ENCODER_NICE = 5
_SLICE_NS = 100_000
_SYS_SCHED_SETATTR_X86_64 = 314
_SCHED_ATTR = struct.Struct("=IIQiIQQQII")
_SCHED_BATCH = 3

_LOOK_EVERY_S = 0.005
_STARVED = 0.03
"""Share of time that the VMM's threads may wait for a CPU before the extra encoders rest."""
_REST_S = 0.02


def lower_priority() -> None:
    """Let other threads preempt the calling thread soon, and never prefer it to another.

    The short slice (Linux 6.12) saves a waking vCPU a wait of several milliseconds.
    """
    content = _SCHED_ATTR.pack(
        _SCHED_ATTR.size, _SCHED_BATCH, 0, _ENCODER_NICE, 0, _SLICE_NS, 0, 0, 0, 0
    )
    libc = ctypes.CDLL(None)
    if libc.syscall(_SYS_SCHED_SETATTR_X86_64, 0, content, 0) != 0:
        os.setpriority(os.PRIO_PROCESS, threading.get_native_id(), _ENCODER_NICE)


class VcpuRunDelay:
    """The time that a VMM's threads wait for a CPU (run delay)."""

    def __init__(self, pid: int) -> None:
        self._fds: list[int] = []
        with contextlib.suppress(OSError):
            for task in Path(f"/proc/{pid}/task").iterdir():
                with contextlib.suppress(OSError):
                    self._fds.append(os.open(task / "schedstat", os.O_RDONLY | os.O_CLOEXEC))
        self._lock = threading.Lock()
        self._at_s = time.monotonic()
        self._waited_ns = self._total_ns()
        self._starved = False

    def _total_ns(self) -> int:
        total = 0
        for fd in self._fds:
            with contextlib.suppress(OSError, IndexError, ValueError):
                total += int(os.pread(fd, 64, 0).split()[1])
        return total

    def rest(self, over: threading.Event) -> None:
        """Rest while the VMM's threads wait for a CPU, until ``over`` is set. An extra encoder
        calls this after each batch."""
        while self._look() and not over.wait(_REST_S):
            pass

    def _look(self) -> bool:
        with self._lock:
            now = time.monotonic()
            elapsed = now - self._at_s
            if elapsed >= _LOOK_EVERY_S:
                waited_ns = self._total_ns()
                self._starved = (waited_ns - self._waited_ns) / 1e9 > _STARVED * elapsed
                self._at_s, self._waited_ns = now, waited_ns
            return self._starved

    def close(self) -> None:
        for fd in self._fds:
            os.close(fd)
        self._fds.clear()
