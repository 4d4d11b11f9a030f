"""The alarm thread: expires the timer."""

from __future__ import annotations

import threading

from stillframe.machine.board.clock import Clock
from stillframe.machine.board.timer import NOT_ARMED, Timer

_LEAST_WAIT_S = 50e-6
"""A guest's timer must not keep a whole CPU of the host busy."""


class Alarm:
    """Methods are called with the board lock held, unless said."""

    def __init__(self, lock: threading.RLock, clock: Clock) -> None:
        self._lock = lock
        self._clock = clock
        self._timer: Timer | None = None
        self._wake = threading.Condition(lock)
        self._quit = False
        self._thread = threading.Thread(target=self._loop, name="stillframe-alarm", daemon=True)

    def serve(self, timer: Timer) -> None:
        """Say for whom it works; before ``start_thread``."""
        self._timer = timer

    def start_thread(self) -> None:
        self._thread.start()

    def look(self) -> None:
        """A deadline changed, or the board goes on."""
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

    def _wait_s(self) -> float | None:
        timer = self._timer
        if timer is None or not self._clock.runs or timer.deadline_ns == NOT_ARMED:
            return None
        left_s = (timer.deadline_ns - self._clock.now_ns()) * 1e-9
        # Longer than threading.TIMEOUT_MAX cannot be waited for.
        return min(max(left_s, _LEAST_WAIT_S), 3600.0)
