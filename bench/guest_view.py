"""The guest's view of a stretch of time, from its tick lines."""

from __future__ import annotations

import bisect
from collections.abc import Sequence
from typing import Protocol, TypeVar

import msgspec

from guests.serial import Tick
from stillframe.errors import MachineError


class GuestView(msgspec.Struct, frozen=True, kw_only=True):
    """One stretch of time, as the guest saw it.

    ``pages_per_s``: pages that the guest wrote per second of the host's monotonic clock.
    ``gap_max_ms``: longest time between two of its TSC readings; includes stops of the VM under
    KVM, but not under TCG, where the TSC stands still in a stop.
    ``gaps_over_1ms``: number of gaps of 1 ms or more.
    """

    seconds: float
    pages_per_s: float
    gap_max_ms: float
    gaps_over_1ms: int


class PageCount(Protocol):
    """A tick of a guest that counts the pages that it has written."""

    @property
    def received_s(self) -> float: ...

    @property
    def pages(self) -> int: ...

    @property
    def gap_us(self) -> int: ...


AnyTick = TypeVar("AnyTick", bound=PageCount)


def pages_per_s(ticks: Sequence[PageCount], from_s: float, to_s: float) -> float:
    """Return the guest's write rate between two moments of our monotonic clock.

    Raises:
        MachineError: the ticks do not cover that time.
    """
    return (_pages_at(ticks, to_s) - _pages_at(ticks, from_s)) / (to_s - from_s)


def _pages_at(ticks: Sequence[PageCount], moment_s: float) -> float:
    """Return the pages written up to a moment, interpolated between two ticks."""
    after = bisect.bisect_left(ticks, moment_s, key=lambda tick: tick.received_s)
    if after == 0 or after == len(ticks):
        raise MachineError("the guest printed no ticks around the measurement")
    one, two = ticks[after - 1], ticks[after]
    share = (moment_s - one.received_s) / (two.received_s - one.received_s)
    return one.pages + share * (two.pages - one.pages)


def ticks_about(ticks: Sequence[AnyTick], from_s: float, to_s: float) -> Sequence[AnyTick]:
    """Return the ticks that report the gaps between two moments."""
    first = bisect.bisect_left(ticks, from_s, key=lambda tick: tick.received_s)
    last = bisect.bisect_left(ticks, to_s, key=lambda tick: tick.received_s)
    # The first tick after the end also reports gaps that ended before it.
    return ticks[first : last + 1]


def guest_view(ticks: Sequence[Tick], from_s: float, to_s: float) -> GuestView:
    """Return the guest's view of the time between two moments of our monotonic clock.

    Raises:
        MachineError: the ticks do not cover that time.
    """
    inside = ticks_about(ticks, from_s, to_s)
    return GuestView(
        seconds=to_s - from_s,
        pages_per_s=pages_per_s(ticks, from_s, to_s),
        gap_max_ms=max(tick.gap_us for tick in inside) / 1e3,
        gaps_over_1ms=max(0, inside[-1].over_1ms - inside[0].over_1ms),
    )
