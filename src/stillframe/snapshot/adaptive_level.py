"""The adaptive compression level, which changes during a snapshot to make it durable soonest.

While the destination keeps up, encoding is the bottleneck, and the level gets faster; while the
destination falls behind, the level gets slower and leaves it less to write. Content has its effect
through this: data that compresses badly ends at the better levels, which cost little on it. zstd's
fast levels differ little in speed on text; if even the fastest cannot feed the destination, every
other frame is stored uncompressed.
"""

from __future__ import annotations

import threading
from typing import Final

from stillframe.still.frames import LEVEL_NONE

LEVELS: Final = (-20, -10, -5, -3, -1, 1)
_EVERY_OTHER_STORED = -1
_FIRST = LEVELS.index(-3)
_LOOK_EVERY_FRAMES = 16
_KEEPS_UP_SHARE = 0.1
_BEHIND_SHARE = 0.3
"""Shares of the encoders' time spent waiting for the destination."""


class AdaptiveLevel:
    """The level controller shared by all encoders of a job; with ``fixed``, a constant level."""

    def __init__(self, fixed: int | None) -> None:
        self._fixed = fixed
        self._lock = threading.Lock()
        self._at = _FIRST
        self._frames = 0
        self._encode_s = self._write_s = 0.0
        self._stored_last = False

    def next_level(self) -> int:
        """Return the level for the next frame."""
        if self._fixed is not None:
            return self._fixed
        with self._lock:
            if self._at != _EVERY_OTHER_STORED:
                return LEVELS[self._at]
            self._stored_last = not self._stored_last
            return LEVEL_NONE if self._stored_last else LEVELS[0]

    def note(self, *, encode_s: float, write_s: float) -> None:
        """Record how long it took to encode a frame, and to write it to the destination."""
        with self._lock:
            self._frames += 1
            self._encode_s += encode_s
            self._write_s += write_s
            if self._frames < _LOOK_EVERY_FRAMES:
                return
            waiting = self._write_s / max(self._encode_s + self._write_s, 1e-9)
            self._frames, self._encode_s, self._write_s = 0, 0.0, 0.0
            if waiting > _BEHIND_SHARE:
                self._at = min(self._at + 1, len(LEVELS) - 1)
            elif waiting < _KEEPS_UP_SHARE:
                self._at = max(self._at - 1, _EVERY_OTHER_STORED)
