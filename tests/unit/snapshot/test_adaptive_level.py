"""The controller of the compression level."""

from __future__ import annotations

from stillframe.snapshot.adaptive_level import LEVELS, AdaptiveLevel
from stillframe.still.frames import LEVEL_NONE

FRAMES = 16 * (len(LEVELS) + 1)


def levels(control: AdaptiveLevel, *, write_s: float) -> list[int]:
    """The last two levels, after long enough of the same."""
    for _ in range(FRAMES):
        control.note(encode_s=0.002, write_s=write_s)
    return [control.next_level(), control.next_level()]


def test_where_the_fastest_level_cannot_feed_the_destination_half_is_stored() -> None:
    assert sorted(levels(AdaptiveLevel(None), write_s=0.0001)) == [LEVEL_NONE, LEVELS[0]]


def test_a_destination_that_falls_behind_gets_less_to_write() -> None:
    assert levels(AdaptiveLevel(None), write_s=0.01) == [LEVELS[-1]] * 2


def test_it_comes_back_from_storing() -> None:
    control = AdaptiveLevel(None)
    levels(control, write_s=0.0001)
    assert levels(control, write_s=0.01) == [LEVELS[-1]] * 2


def test_in_between_the_level_stays() -> None:
    control = AdaptiveLevel(None)
    before = control.next_level()
    assert levels(control, write_s=0.0005) == [before] * 2


def test_a_fixed_level_is_kept() -> None:
    assert levels(AdaptiveLevel(9), write_s=0.01) == [9, 9]
    assert levels(AdaptiveLevel(9), write_s=0.0001) == [9, 9]
