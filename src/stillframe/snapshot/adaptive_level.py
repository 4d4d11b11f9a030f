"""Chooses the compression level while the snapshot is taken, so that it is durable soonest.

While the destination keeps up, encoding is what takes the time, and a faster level is chosen;
while it falls behind, a slower one that gives it less to write. Content decides with that: what
compresses badly ends at the better levels, which cost little on it.
"""

from __future__ import annotations

import threading
from typing import Final

LEVELS: Final = (-20, -10, -5, -3, -1, 1)
_FIRST = LEVELS.index(-3)
_LOOK_EVERY_FRAMES = 16
_BEHIND_BYTES = 48 << 20
_KEEPS_UP_BYTES = 20 << 20
_BEHIND_SHARE = 0.5
"""Share of the encoders' time that they spend waiting for the destination."""


class AdaptiveLevel:
    """One controller for all encoders of a job; or a fixed level."""

    def __init__(self, fixed: int | None) -> None:
        self._fixed = fixed
        self._lock = threading.Lock()
        self._at = _FIRST
        self._frames = 0
        self._encode_s = self._write_s = 0.0

    @property
    def level(self) -> int:
        return LEVELS[self._at] if self._fixed is None else self._fixed

    def note(self, *, encode_s: float, write_s: float, backlog_bytes: int) -> None:
        """After each frame: what encoding and writing it took, and how far the disk is behind."""
        with self._lock:
            self._frames += 1
            self._encode_s += encode_s
            self._write_s += write_s
            if self._frames < _LOOK_EVERY_FRAMES:
                return
            waiting = self._write_s > _BEHIND_SHARE * (self._encode_s + self._write_s)
            self._frames, self._encode_s, self._write_s = 0, 0.0, 0.0
            if backlog_bytes > _BEHIND_BYTES or waiting:
                self._at = min(self._at + 1, len(LEVELS) - 1)
            elif backlog_bytes < _KEEPS_UP_BYTES:
                self._at = max(self._at - 1, 0)
