"""Rate and time left: of what costs time, over the last seconds."""

from __future__ import annotations

from typing import Any

import pytest

from stillframe.snapshot import rate as rate_module
from stillframe.snapshot.job import JobControl
from stillframe.snapshot.rate import RateMeter

MIB = 1 << 20


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> list[float]:
    now = [100.0]
    monkeypatch.setattr(rate_module.time, "monotonic", lambda: now[0])
    return now


def test_rates_are_of_the_windows_that_are_kept(clock: list[float]) -> None:
    meter = RateMeter(5.0)
    meter.note(0, 0)
    assert meter.rates() == ()
    clock[0] += 0.05
    meter.note(40 * MIB, 0)
    assert meter.rates() == (), "the first window is not over"
    clock[0] += 0.95
    meter.note(50 * MIB, 10 * MIB)
    assert meter.rates() == (50 * MIB, 10 * MIB)
    assert meter.covered_s == pytest.approx(1)


def test_what_is_long_past_does_not_count(clock: list[float]) -> None:
    meter = RateMeter(5.0)
    done = 0
    for second in range(30):
        done += (100 if second < 15 else 2) * MIB
        clock[0] += 1
        meter.note(done)
        if second == 12:
            assert meter.rates() == (100 * MIB,)
    assert meter.rates() == (2 * MIB,)


def test_short_times_are_gathered_into_windows() -> None:
    meter = RateMeter(0.2)
    for _ in range(5):
        meter.add(0.05, 1)
    assert [passed for passed, _ in meter.windows] == pytest.approx([0.1, 0.1])
    assert meter.rates() == pytest.approx((20,))


class _Ram:
    spill_bytes = 0

    def __init__(self, numbers: dict[str, Any]) -> None:
        self.numbers = numbers

    def statistics(self) -> dict[str, Any]:
        return dict(self.numbers)


def test_pages_that_were_never_populated_are_no_progress(clock: list[float]) -> None:
    """As with --max-bandwidth: a gigabyte without content went by, one mebibyte was written."""
    ram: Any = _Ram({"pages_done": 0, "pages_wanted": 1 << 20, "pages_populated": 5 * 256})
    control = JobControl()
    progress = control.progress
    progress.ram, progress.ram_bytes = ram, 1029 * MIB
    control.enter("active", "saving")
    progress.statistics()
    clock[0] += 2
    ram.numbers |= {
        "pages_done": 1027 * 256,  # two mebibytes wait in the spill
        "pages_never_populated": 1024 * 256,
        "pages_zero": 1024 * 256,
        "pages_data": 256,
    }
    assert progress.statistics().eta_s == pytest.approx(8)
    control.enter("active", "syncing")
    control.end(failed=False)
    assert progress.statistics().eta_s is None
