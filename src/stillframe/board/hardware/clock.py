"""The virtual clock: monotonic nanoseconds that do not pass while the board is stopped."""

from __future__ import annotations

import time

from stillframe.board.hardware.layout import VCPUS_LIMIT
from stillframe.board.state.fields import StateDescription, array, u32, u64

_MASK = (1 << 64) - 1
LIMIT_NS = 1 << 62
"""No board has run for so long; deadlines, of 63 bits, can lie beyond it."""


class Clock:
    """The virtual clock, stopped at first. Guarded by the board lock."""

    LOW, HIGH = 0, 4
    COUNT = 8

    def __init__(self) -> None:
        self._started_ns: int | None = None
        self.stopped_ns = 0
        self.latched_high = [0] * VCPUS_LIMIT

    @property
    def runs(self) -> bool:
        return self._started_ns is not None

    def now_ns(self) -> int:
        """Return the virtual time for which the board has run."""
        if self._started_ns is None:
            return self.stopped_ns
        return self.stopped_ns + time.monotonic_ns() - self._started_ns

    def start(self) -> None:
        if self._started_ns is None:
            self._started_ns = time.monotonic_ns()

    def stop(self) -> None:
        self.stopped_ns = self.now_ns()
        self._started_ns = None

    def reset(self) -> None:
        """Clear the latched upper halves; time goes on, since it is monotonic."""
        self.latched_high[:] = [0] * VCPUS_LIMIT

    def read_port(self, offset: int, size_bytes: int, vcpu: int) -> int:
        if offset == self.LOW:
            now_ns = self.now_ns() & _MASK
            self.latched_high[vcpu] = now_ns >> 32
            return now_ns & 0xFFFFFFFF
        if offset == self.HIGH:
            return self.latched_high[vcpu]
        return 0

    def write_port(self, offset: int, size_bytes: int, value: int, vcpu: int) -> None:
        """Do nothing: the clock cannot be set."""


def _check(clock: Clock, version_id: int) -> None:
    if clock.stopped_ns >= LIMIT_NS:
        raise ValueError(f"it cannot have run for {clock.stopped_ns} ns")


CLOCK = StateDescription(
    name="clock",
    version_id=1,
    minimum_version_id=1,
    fields=(u64("stopped_ns"), array("latched_high", u32, VCPUS_LIMIT)),
    post_load=_check,
)
