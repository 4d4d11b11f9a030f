"""The alarm thread, which expires the timer."""

from __future__ import annotations

import threading

from stillframe.board.hardware.board_thread import BoardThread
from stillframe.board.hardware.clock import Clock
from stillframe.board.hardware.timer import NOT_ARMED, Timer

_LEAST_WAIT_S = 50e-6
"""Keeps a guest's timer from occupying a whole host CPU."""


class Alarm(BoardThread):
    def __init__(self, lock: threading.RLock, clock: Clock) -> None:
        super().__init__("alarm", lock)
        self._clock = clock
        self._timer: Timer | None = None

    def serve(self, timer: Timer) -> None:
        """Set the timer that this thread expires; before ``start_thread``."""
        self._timer = timer

    def _loop(self) -> None:
        with self._lock:
            while not self._quit:
                self._wake.wait(self._wait_s())
                if self._clock.runs and self._timer is not None:
                    self._timer.expire()

    def _wait_s(self) -> float | None:
        timer = self._timer
        if timer is None or not self._clock.runs or timer.deadline_ns == NOT_ARMED:
            return None
        left_s = (timer.deadline_ns - self._clock.now_ns()) * 1e-9
        # A wait longer than threading.TIMEOUT_MAX would raise OverflowError.
        return min(max(left_s, _LEAST_WAIT_S), 3600.0)
