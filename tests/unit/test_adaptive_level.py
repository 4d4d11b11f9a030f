"""The controller of the compression level."""

from __future__ import annotations

import pytest

from stillframe.snapshot.adaptive_level import LEVELS, AdaptiveLevel

FRAMES = 16 * (len(LEVELS) + 1)


def run(control: AdaptiveLevel, *, write_s: float, backlog_mib: int) -> int:
    for _ in range(FRAMES):
        control.note(encode_s=0.002, write_s=write_s, backlog_bytes=backlog_mib << 20)
    return control.level


def test_a_destination_that_keeps_up_gets_the_fastest_level() -> None:
    assert run(AdaptiveLevel(None), write_s=0.0002, backlog_mib=4) == LEVELS[0]


@pytest.mark.parametrize(("write_s", "backlog_mib"), [(0.0002, 100), (0.01, 0)])
def test_a_destination_that_falls_behind_gets_less_to_write(
    write_s: float, backlog_mib: int
) -> None:
    assert run(AdaptiveLevel(None), write_s=write_s, backlog_mib=backlog_mib) == LEVELS[-1]


def test_in_between_the_level_stays() -> None:
    control = AdaptiveLevel(None)
    before = control.level
    assert run(control, write_s=0.0002, backlog_mib=32) == before


def test_a_fixed_level_is_kept() -> None:
    assert run(AdaptiveLevel(9), write_s=0.01, backlog_mib=100) == 9
