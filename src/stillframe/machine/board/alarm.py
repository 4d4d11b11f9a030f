"""The alarm thread: expires the timer, and nudges vCPUs that have an interrupt to take."""

from __future__ import annotations

import threading
from collections.abc import Sequence

from stillframe.machine.board.clock import Clock
from stillframe.machine.board.timer import NOT_ARMED, Timer
from stillframe.machine.board.vcpu import Vcpu

_LEAST_WAIT_S = 50e-6
"""A guest's timer must not keep a whole CPU of the host busy."""
_FIRST_NUDGE_S = 100e-6
_LAST_NUDGE_S = 4e-3
"""Longest that an interrupt waits after the guest has enabled interrupts again."""


class Alarm:
    """Methods are called with the board lock held, unless said."""

    def __init__(self, lock: threading.RLock, clock: Clock) -> None:
        self._lock = lock
        self._clock = clock
        self._timer: Timer | None = None
        self._vcpus: Sequence[Vcpu] = ()
        self._wake = threading.Condition(lock)
        self._nudge_s: float | None = None
        self._quit = False
        self._thread = threading.Thread(target=self._loop, name="stillframe-alarm", daemon=True)

    def serve(self, timer: Timer, vcpus: Sequence[Vcpu]) -> None:
        """Say for whom it works; before ``start_thread``."""
        self._timer = timer
        self._vcpus = vcpus

    def start_thread(self) -> None:
        self._thread.start()

    def look(self) -> None:
        """A deadline changed, or the board goes on."""
        self._wake.notify()

    def nudge_soon(self) -> None:
        """A vCPU has an interrupt that it cannot take yet, since IF is clear; nothing tells when
        that changes."""
        if self._nudge_s is None:
            self._nudge_s = _FIRST_NUDGE_S
            self._wake.notify()

    def quit(self) -> None:
        self._quit = True
        self._wake.notify()

    def join(self) -> None:
        """Wait for the thread's end, without the board lock."""
        if self._thread.ident is not None:
            self._thread.join()

    def _loop(self) -> None:
        with self._lock:
            while not self._quit:
                self._wake.wait(self._wait_s())
                if self._clock.runs and self._timer is not None:
                    self._timer.expire()
                self._nudge()

    def _wait_s(self) -> float | None:
        waits = [] if self._nudge_s is None else [self._nudge_s]
        if self._clock.runs and self._timer is not None and self._timer.deadline_ns != NOT_ARMED:
            left_s = (self._timer.deadline_ns - self._clock.now_ns()) * 1e-9
            # Longer than threading.TIMEOUT_MAX cannot be waited for.
            waits.append(min(max(left_s, _LEAST_WAIT_S), 3600.0))
        return min(waits) if waits else None

    def _nudge(self) -> None:
        if self._nudge_s is None:
            return
        # All of them, not just until the first.
        waiting = [vcpu.nudge() for vcpu in self._vcpus]
        self._nudge_s = min(self._nudge_s * 2, _LAST_NUDGE_S) if any(waiting) else None
