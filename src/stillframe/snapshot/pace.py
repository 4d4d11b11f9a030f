"""How fast a job gets on: over the last seconds, and by what costs time."""

from __future__ import annotations

import threading
import time
from collections import deque

_WINDOW_S = 5.0
_TOO_EARLY_S = 1.0
"""A rate of the first moment says nothing about the time that is left."""
_STEP_S = 0.1


class Pace:
    """Rates over a window of five seconds. May be used from any thread.

    Pages that were never populated are passed over in no time, so they are no part of it: counted,
    they make a slow job look fast, and then the rest of it endless.
    """

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._samples: deque[tuple[float, int, int]] = deque()

    def note(self, done_bytes: int, written_bytes: int) -> tuple[float, float]:
        """So much is done now; rates of both, bytes per second.

        Args:
            done_bytes: of populated RAM. written_bytes: that went to the destination.
        """
        now_s = time.monotonic()
        with self._lock:
            samples = self._samples
            if not samples or now_s - samples[-1][0] >= _STEP_S:
                samples.append((now_s, done_bytes, written_bytes))
            while len(samples) > 2 and now_s - samples[1][0] >= _WINDOW_S:
                samples.popleft()
            since_s, done, written = samples[0]
        elapsed_s = now_s - since_s
        if elapsed_s < _TOO_EARLY_S:
            return 0.0, 0.0
        return (done_bytes - done) / elapsed_s, (written_bytes - written) / elapsed_s
