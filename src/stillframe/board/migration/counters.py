"""A migration's counters: bytes, pages, rounds and speeds.

Only the migration's thread writes, except that the return path's thread counts
``postcopy_requests``. Readers in other threads may see slightly old numbers.
"""

from __future__ import annotations

import time
from typing import Literal

from stillframe.model import TARGET_PAGE_BYTES, Statistics
from stillframe.snapshot.rate import RateMeter

Stage = Literal["precopy", "downtime", "postcopy"]


class Counters:
    """The counts of one outgoing migration; ``_s`` times are ``time.monotonic`` seconds."""

    def __init__(self) -> None:
        self.stage: Stage = "precopy"
        self.bytes_by_stage: dict[Stage, int] = {"precopy": 0, "downtime": 0, "postcopy": 0}
        self.zero_pages = 0
        self.data_pages = 0
        self.ram_bytes = 0
        self.remaining_bytes = 0
        self.dirty_syncs = 0
        self.dirty_pages_per_s = 0
        self.postcopy_requests = 0
        self.setup_ms = 0.0
        self.downtime_ms = 0.0
        self.expected_downtime_ms = 0.0
        self.mbps = 0.0
        self.pages_per_s = 0.0
        self.began_s = time.monotonic()
        self.ended_s: float | None = None
        self._transfer_began_s = self.began_s
        self._meter = RateMeter()

    @property
    def transferred_bytes(self) -> int:
        return sum(self.bytes_by_stage.values())

    @property
    def pages(self) -> int:
        return self.zero_pages + self.data_pages

    @property
    def total_ms(self) -> float:
        return ((self.ended_s or time.monotonic()) - self.began_s) * 1e3

    def took(self, length_bytes: int) -> None:
        """Count bytes that the channel took."""
        self.bytes_by_stage[self.stage] += length_bytes

    def begin_transfer(self) -> None:
        """End setup and start the transfer's clock."""
        self._transfer_began_s = time.monotonic()
        self.setup_ms = (self._transfer_began_s - self.began_s) * 1e3
        self.measure()

    def follow(self, statistics: Statistics) -> None:
        """Take over a background snapshot's numbers."""
        self.bytes_by_stage["precopy"] = statistics.file_bytes
        self.zero_pages, self.data_pages = statistics.pages.zero, statistics.pages.data
        self.remaining_bytes = max(0, self.ram_bytes - self.pages * TARGET_PAGE_BYTES)
        self.downtime_ms = statistics.downtime_ms
        self.measure()

    def measure(self) -> None:
        """Update the speeds, measured over a tenth of a second; call it between batches."""
        self._meter.note(self.transferred_bytes, self.pages)
        if rates := self._meter.rates():
            self.mbps = rates[0] * 8 / 1e6
            self.pages_per_s = rates[1]

    def end(self) -> None:
        """End the count; the speeds become averages over the whole transfer."""
        self.ended_s = time.monotonic()
        passed = max(1e-3, self.ended_s - self._transfer_began_s)
        self.mbps = self.transferred_bytes * 8 / passed / 1e6
