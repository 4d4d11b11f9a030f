"""A meter for a job's rates, and a limit on its bandwidth."""

from __future__ import annotations

import threading
import time
from collections import deque

WINDOW_S = 0.1
"""The window that QEMU measures over, too (``migration/migration.c``: BUFFER_DELAY)."""
_BURST_S = 0.1
_EPSILON_S = 1e-6


class RateMeter:
    """Rates of one or more counts, in windows of a tenth of a second. Thread-safe.

    Args:
        span_s: how much time the kept windows cover; the last window is always kept.
    """

    def __init__(self, span_s: float = WINDOW_S) -> None:
        self._span_s = span_s
        self._lock = threading.Lock()
        self._windows: deque[tuple[float, tuple[float, ...]]] = deque()
        self._now: tuple[float, tuple[float, ...]] = 0.0, ()
        self._seen: tuple[float, tuple[float, ...]] | None = None
        self.covered_s = 0.0
        """Total length of the kept windows."""

    def add(self, passed_s: float, *amounts: float) -> None:
        """Record the amounts that came in ``passed_s`` seconds."""
        with self._lock:
            self._add(passed_s, amounts)

    def _add(self, passed_s: float, amounts: tuple[float, ...]) -> None:
        before_s, before = self._now
        passed_s += before_s
        amounts = tuple(map(sum, zip(before, amounts, strict=True))) if before else amounts
        self._now = passed_s, amounts
        if passed_s < WINDOW_S - _EPSILON_S:
            return
        self._now = 0.0, ()
        self._windows.append((passed_s, amounts))
        self.covered_s += passed_s
        while len(self._windows) > 1 and self.covered_s > self._span_s + _EPSILON_S:
            self.covered_s -= self._windows.popleft()[0]

    def note(self, *totals: float) -> None:
        """Record the current totals of the counts, at the current monotonic time."""
        now_s = time.monotonic()
        with self._lock:
            if self._seen is None:
                self._seen = now_s, totals
                return
            seen_s, seen = self._seen
            if now_s - seen_s >= WINDOW_S - _EPSILON_S:
                grown = tuple(new - old for new, old in zip(totals, seen, strict=True))
                self._add(now_s - seen_s, grown)
                self._seen = now_s, totals

    @property
    def windows(self) -> list[tuple[float, tuple[float, ...]]]:
        """The kept windows, oldest first: seconds, and the amounts that came in them."""
        with self._lock:
            return list(self._windows)

    def rates(self) -> tuple[float, ...]:
        """Return each count's rate per second over the kept windows; empty if there is none yet."""
        windows = self.windows
        passed_s = sum(passed for passed, _ in windows)
        return tuple(sum(each) / passed_s for each in zip(*(w for _, w in windows), strict=True))


class BandwidthLimit:
    """A token bucket of a tenth of a second; ``None`` is unlimited, QEMU's default for
    background snapshots.

    Attributes:
        bytes_per_s: may be changed at any time; takes effect at the next ``wait``.
    """

    def __init__(self, bytes_per_s: int | None) -> None:
        self.bytes_per_s = bytes_per_s
        self._lock = threading.Lock()
        self._free_at = time.monotonic()

    def wait(self, length_bytes: int, stop: threading.Event) -> None:
        """Return when ``length_bytes`` may be written, or ``stop`` is set."""
        rate = self.bytes_per_s
        if rate is None:
            return
        with self._lock:
            now = time.monotonic()
            self._free_at = max(self._free_at, now - _BURST_S) + length_bytes / rate
            delay = self._free_at - now
        if delay > 0:
            stop.wait(delay)
