"""The figures of one repetition, and their medians."""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from typing import Any

import msgspec

from bench.free_run import FreeRun
from bench.guest_view import GuestView
from bench.methods import Saved

_MIB = float(1 << 20)


class Figures(msgspec.Struct, frozen=True, kw_only=True):
    """Figures of one save by one method; docs/reference/measurements.md defines each."""

    downtime_ms: float | None
    gap_max_ms: float
    gaps_over_1ms: int
    stall_max_ms: float
    free_gap_max_ms: float
    progress: float
    lost_s: float
    window_s: float
    durable_s: float
    file_mib: float
    written_mib: float
    peak_mib: float
    vmm_grew_mib: float
    cpu_s: float | None
    spill_peak_mib: float | None
    spill_stall_ms: float | None
    free_pages_per_s: float
    cpu_wait: float
    free_cpu_wait: float
    own: dict[str, Any]


def figures(
    saved: Saved, during: GuestView, before: FreeRun, after: FreeRun, cpu_wait: float
) -> Figures:
    """Combine the measurements of one save.

    Args:
        during: from the first possible effect on the guest until the file was durable.
        before, after: the undisturbed guest, right before and right after.
        cpu_wait: share of the save in which a vCPU was runnable but had no CPU.
    """
    free_rate = (before.view.pages_per_s + after.view.pages_per_s) / 2
    progress = during.pages_per_s / free_rate
    spill_peak = saved.own.get("spill_peak_bytes")
    return Figures(
        downtime_ms=saved.downtime_ms,
        gap_max_ms=during.gap_max_ms,
        gaps_over_1ms=during.gaps_over_1ms,
        # The guest's own maximum since the reset, which includes the free run afterwards.
        stall_max_ms=after.stall_max_ms,
        free_gap_max_ms=max(before.view.gap_max_ms, after.view.gap_max_ms),
        progress=progress,
        lost_s=during.seconds * (1 - progress),
        window_s=during.seconds,
        durable_s=saved.durable_s - saved.began_s,
        file_mib=saved.file_bytes / _MIB,
        written_mib=saved.written_bytes / _MIB,
        peak_mib=saved.peak_bytes / _MIB,
        vmm_grew_mib=saved.vmm_grew_bytes / _MIB,
        cpu_s=saved.cpu_s,
        spill_peak_mib=None if spill_peak is None else spill_peak / _MIB,
        spill_stall_ms=saved.own.get("stall_ms"),
        free_pages_per_s=free_rate,
        cpu_wait=cpu_wait,
        free_cpu_wait=(before.cpu_wait + after.cpu_wait) / 2,
        own=saved.own,
    )


class Spread(msgspec.Struct, frozen=True, kw_only=True):
    """Median, minimum and maximum of the repetitions."""

    median: float
    least: float
    greatest: float


NUMBERS = tuple(name for name in Figures.__struct_fields__ if name != "own")


def spreads(
    repetitions: Sequence[msgspec.Struct], names: Sequence[str] = NUMBERS
) -> dict[str, Spread]:
    """Return the spreads by figure name, without figures that the method does not have."""
    result: dict[str, Spread] = {}
    for name in names:
        values = [float(v) for r in repetitions if (v := getattr(r, name)) is not None]
        if values:
            result[name] = Spread(
                median=statistics.median(values), least=min(values), greatest=max(values)
            )
    return result


_COMPARED = (
    "downtime_ms",
    "gap_max_ms",
    "stall_max_ms",
    "progress",
    "durable_s",
    "file_mib",
    "written_mib",
    "peak_mib",
)


def ratios(
    ours: dict[str, Spread], theirs: dict[str, Spread], names: Sequence[str] = _COMPARED
) -> dict[str, float]:
    """Return the ratios of our medians to theirs, for figures where a ratio is meaningful; leave
    out those where theirs is 0."""
    return {
        name: ours[name].median / theirs[name].median
        for name in names
        if name in ours and name in theirs and theirs[name].median
    }
