"""Rate and time left: of what costs time, over the last seconds."""

from __future__ import annotations

from typing import Any

import pytest

from stillframe.snapshot import pace as pace_module
from stillframe.snapshot.pace import Pace
from stillframe.snapshot.progress import Progress

MIB = 1 << 20


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> list[float]:
    now = [100.0]
    monkeypatch.setattr(pace_module.time, "monotonic", lambda: now[0])
    return now


def test_the_first_second_says_nothing(clock: list[float]) -> None:
    pace = Pace()
    assert pace.note(0, 0) == (0, 0)
    clock[0] += 0.9
    assert pace.note(50 * MIB, 9 * MIB) == (0, 0)
    clock[0] += 0.1
    assert pace.note(50 * MIB, 10 * MIB) == (50 * MIB, 10 * MIB)


def test_what_is_long_past_does_not_count(clock: list[float]) -> None:
    pace = Pace()
    done = 0
    for second in range(30):
        done += (100 if second < 15 else 2) * MIB
        clock[0] += 1
        rate, _ = pace.note(done, 0)
        if second == 12:
            assert rate == 100 * MIB
    assert rate == 2 * MIB


class _Ram:
    spill_bytes = 0

    def __init__(self, numbers: dict[str, Any]) -> None:
        self.numbers = numbers

    def statistics(self) -> dict[str, Any]:
        return dict(self.numbers)


def test_pages_that_were_never_populated_are_no_progress(clock: list[float]) -> None:
    """As with --max-bandwidth: a gigabyte without content went by, one mebibyte was written."""
    ram: Any = _Ram({"pages_done": 0, "pages_populated": 5 * 256})
    progress = Progress()
    progress.ram, progress.ram_bytes = ram, 1029 * MIB
    progress.begin("active", "saving")
    progress.statistics()
    clock[0] += 2
    ram.numbers |= {
        "pages_done": 1027 * 256,  # two mebibytes wait in the spill
        "pages_never_populated": 1024 * 256,
        "pages_zero": 1024 * 256,
        "pages_data": 256,
    }
    assert progress.statistics().eta_s == pytest.approx(8)
    progress.begin("active", "syncing")
    progress.begin("completed", "completed")
    assert progress.statistics().eta_s is None
