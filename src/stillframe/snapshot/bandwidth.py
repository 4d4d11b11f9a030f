"""A limit on what goes to the sink."""

from __future__ import annotations

import threading
import time

_BURST_S = 0.1


class BandwidthLimit:
    """Token bucket of a tenth of a second; ``None`` is unlimited, QEMU's default for
    background snapshots.

    Attributes:
        bytes_per_s: may be changed at any time, and holds from the next ``wait`` on.
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
