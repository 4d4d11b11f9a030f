"""The run delay of a VM's vCPU threads, in which they were runnable but had no CPU: host noise.

From /proc/PID/task/TID/schedstat, second field (kernel Documentation/scheduler/sched-stats.rst).
"""

from __future__ import annotations

import bisect
import contextlib
import threading
import time
from collections.abc import Sequence
from pathlib import Path

_SAMPLE_S = 0.02


class CpuWait:
    """A sampler of a VM's vCPU threads, until it is closed; its own cost is negligible."""

    def __init__(self, pid: int, thread_ids: Sequence[int]) -> None:
        self._paths = [Path(f"/proc/{pid}/task/{tid}/schedstat") for tid in thread_ids]
        self._samples: list[tuple[float, float]] = []
        self._end = threading.Event()
        self._sample()
        self._thread = threading.Thread(target=self._run, name="cpu-wait", daemon=True)
        self._thread.start()

    def _run(self) -> None:
        while not self._end.wait(_SAMPLE_S):
            self._sample()

    def _sample(self) -> None:
        with contextlib.suppress(OSError):
            waited_ns = sum(int(path.read_text().split()[1]) for path in self._paths)
            self._samples.append((time.monotonic(), waited_ns / 1e9))

    def share(self, from_s: float, to_s: float) -> float:
        """Return the share of the time between two moments of our monotonic clock that a vCPU
        waited on average, 0 to 1; 0 if the kernel does not count it."""
        if len(self._samples) < 2:
            return 0.0
        moments = [moment for moment, _ in self._samples]
        last = len(moments) - 1
        one = max(0, bisect.bisect_right(moments, from_s) - 1)
        two = min(last, bisect.bisect_left(moments, to_s))
        if two <= one:
            return 0.0
        passed_s = moments[two] - moments[one]
        waited_s = self._samples[two][1] - self._samples[one][1]
        return waited_s / passed_s / len(self._paths)

    def close(self) -> None:
        """End the sampling."""
        self._end.set()
        self._thread.join()
