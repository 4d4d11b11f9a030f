"""What may be counted on while the guest stands still."""

from __future__ import annotations

import pytest

from stillframe.board.migration.live import SPAN_S, dependable_bytes_per_s
from stillframe.snapshot.rate import RateMeter

MIB = 1 << 20


class Speed:
    def __init__(self) -> None:
        self._meter = RateMeter(SPAN_S)

    def add(self, length_bytes: int, *, busy_s: float, waited_s: float = 0.0) -> None:
        self._meter.add(busy_s + waited_s, length_bytes, busy_s)

    @property
    def bytes_per_s(self) -> float:
        return dependable_bytes_per_s(self._meter)


def test_nothing_is_known_before_a_window_is_over() -> None:
    speed = Speed()
    speed.add(100 * MIB, busy_s=0.05)
    assert speed.bytes_per_s == 0.0


def test_a_channel_without_a_limit_is_not_counted_on_in_full() -> None:
    speed = Speed()
    for _ in range(10):
        speed.add(2 * MIB, busy_s=0.02)
    assert speed.bytes_per_s == pytest.approx(50 * MIB)


def test_a_limit_is_counted_on_where_there_was_time_left() -> None:
    speed = Speed()
    speed.add(20 * MIB, busy_s=0.02, waited_s=0.18)
    assert speed.bytes_per_s == pytest.approx(100 * MIB)


def test_the_slowest_of_the_last_windows_counts() -> None:
    """The first one may only have filled buffers."""
    speed = Speed()
    for mib in (400, 10, 30):
        speed.add(mib * MIB, busy_s=0.1)
    assert speed.bytes_per_s == pytest.approx(50 * MIB)
    for _ in range(3):
        speed.add(60 * MIB, busy_s=0.1)
    assert speed.bytes_per_s == pytest.approx(300 * MIB)


def test_what_the_destination_takes_in_the_end_counts_as_time() -> None:
    speed = Speed()
    speed.add(10 * MIB, busy_s=0.01)
    speed.add(0, busy_s=0.19)
    assert speed.bytes_per_s == pytest.approx(25 * MIB)
