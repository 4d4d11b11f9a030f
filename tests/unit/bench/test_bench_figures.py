"""How the benchmark turns events, ticks and samples into figures."""

from __future__ import annotations

import pytest

from bench.case import Case, CaseResult, MethodResult
from bench.figures import Spread, ratios
from bench.guest_view import guest_view
from bench.observer import Event, stopped_ms
from bench.table import case_table
from bench.targets import targets_text
from guests.serial import Tick
from stillframe.errors import MachineError


def _event(name: str, sent_s: float) -> Event:
    return Event(name=name, sent_s=sent_s, received_s=0.0)


def _tick(received_s: float, pages: int, gap_us: int = 50, over_1ms: int = 0) -> Tick:
    return Tick(
        n=0,
        t_ms=0,
        passes=0,
        pages=pages,
        gap_us=gap_us,
        gap_max_us=0,
        stop_us=0,
        stop_max_us=0,
        stall_max_us=0,
        over_1ms=over_1ms,
        seconds=0,
        received_s=received_s,
    )


def test_downtime_is_the_sum_of_all_stops() -> None:
    events = [_event("STOP", 1.0), _event("MIGRATION", 1.001), _event("RESUME", 1.002)]
    events += [_event("STOP", 2.0), _event("RESUME", 2.5)]
    assert stopped_ms(events) == pytest.approx(502.0)


def test_no_downtime_without_a_pair() -> None:
    assert stopped_ms([_event("RESUME", 1.0), _event("STOP", 2.0)]) is None


def test_pages_are_interpolated_and_only_gaps_of_the_stretch_count() -> None:
    ticks = [
        _tick(0.0, 0),
        _tick(1.0, 1000, gap_us=90_000, over_1ms=1),
        _tick(2.0, 2000, gap_us=7_000, over_1ms=3),
        _tick(3.0, 2200, gap_us=9_000, over_1ms=4),
        _tick(4.0, 3200, gap_us=80_000, over_1ms=9),
    ]
    view = guest_view(ticks, 1.5, 2.5)
    assert view.pages_per_s == pytest.approx(500 + 100)
    assert view.gap_max_ms == 9.0
    assert view.gaps_over_1ms == 1


def test_ticks_must_cover_the_stretch() -> None:
    with pytest.raises(MachineError):
        guest_view([_tick(0.0, 0), _tick(1.0, 10)], 0.5, 1.5)


def _spread(value: float) -> Spread:
    return Spread(median=value, least=value, greatest=value)


def test_ratios_are_of_medians_and_leave_out_zero() -> None:
    ours = {"downtime_ms": _spread(2.0), "durable_s": _spread(3.0), "window_s": _spread(1.0)}
    theirs = {"downtime_ms": _spread(8.0), "durable_s": _spread(0.0), "window_s": _spread(1.0)}
    assert ratios(ours, theirs) == {"downtime_ms": 0.25}


@pytest.mark.parametrize(("progress", "word"), [(0.9, "(reached)"), (0.8, "(NOT reached)")])
def test_targets_tell_whether_they_are_reached(progress: float, word: str) -> None:
    case = Case(
        guest="linux",
        ram_mib=256,
        populate_mib=0,
        fill="text",
        mem_mib=64,
        rate_mib_per_s=0,
        rest_us=0,
        memory="memfd",
        accelerator="tcg",
    )
    ours = MethodResult(
        spreads={"progress": _spread(progress), "spill_stall_ms": _spread(0.0)},
        failures=["it did not work"],
    )
    result = CaseResult(case=case, methods={"take": ours, "qemu": MethodResult()})
    text = targets_text([result], "qemu")
    assert [line for line in text.splitlines() if "85 %" in line and word in line]
    assert "take failed: it did not work" in case_table(result, "qemu")
