"""How fast the destination takes what is sent."""

from __future__ import annotations

from collections import deque

WINDOW_S = 0.1
"""QEMU measures over as long (``migration/migration.c``: BUFFER_DELAY)."""
_WINDOWS = 3
"""More than one: the first may only have filled buffers on the way."""
_SHARE = 0.5
"""Of what a channel without a limit takes: while the guest stands still there are also the devices,
and the destination's answer."""


class Speed:
    """What may be counted on while the guest stands still: the least of the last windows of a tenth
    of a second each. Only the time counts in which there was something to send, else a guest that
    writes little would have a slow channel."""

    def __init__(self) -> None:
        self._windows: deque[float] = deque(maxlen=_WINDOWS)
        self._bytes = 0
        self._busy_s = self._waited_s = 0.0

    def add(self, length_bytes: int, *, busy_s: float, waited_s: float = 0.0) -> None:
        """So much went out in so much time; or nothing did, while the destination took the rest.

        Args:
            waited_s: what was waited besides, to keep within the bandwidth limit.
        """
        self._bytes += length_bytes
        self._busy_s += busy_s
        self._waited_s += waited_s
        passed_s = self._busy_s + self._waited_s
        if passed_s >= WINDOW_S:
            reached = self._bytes / passed_s
            # Who had to wait has shown that the channel takes at least as much.
            self._windows.append(min(reached, _SHARE * self._bytes / max(1e-9, self._busy_s)))
            self._bytes, self._busy_s, self._waited_s = 0, 0.0, 0.0

    @property
    def bytes_per_s(self) -> float:
        """0.0 before the first window is over."""
        return min(self._windows, default=0.0)
