"""The figures compared with the project's targets. A missed target has no effect."""

from __future__ import annotations

from collections.abc import Sequence

from bench.case import CaseResult, MethodResult

_OURS = "take"


def _median(method: MethodResult, figure: str) -> float | None:
    spread = method.spreads.get(figure)
    return None if spread is None else spread.median


def _line(what: str, reached: bool | None, value: str) -> str:
    word = "no figure" if reached is None else "reached" if reached else "NOT reached"
    return f"  {what}: {value} ({word})"


def targets_text(results: Sequence[CaseResult], peer: str) -> str:
    """Return a line for each target and each case that it concerns."""
    lines = ["Targets (medians):"]
    for result in results:
        ours, theirs = result.methods.get(_OURS), result.methods.get(peer)
        if ours is None or not ours.spreads:
            continue
        case = result.case
        rate = "full speed" if case.rate_mib_per_s == 0 else f"{case.rate_mib_per_s} MiB/s"
        lines.append(f" {case.ram_mib} MiB, {rate}, {case.fill}:")
        if case.rate_mib_per_s == 0:
            lines += _full_load(ours, theirs)
        else:
            lines += _moderate_load(ours)
        lines += _durable(ours, theirs)
    return "\n".join(lines)


def _moderate_load(ours: MethodResult) -> list[str]:
    downtime, gap = _median(ours, "downtime_ms"), _median(ours, "gap_max_ms")
    return [
        _line(
            "downtime below 10 ms",
            None if downtime is None else downtime < 10,
            "-" if downtime is None else f"{downtime:.1f} ms",
        ),
        _line(
            "longest gap below 10 ms",
            None if gap is None else gap < 10,
            "-" if gap is None else f"{gap:.1f} ms",
        ),
    ]


def _full_load(ours: MethodResult, theirs: MethodResult | None) -> list[str]:
    lines: list[str] = []
    downtime = _median(ours, "downtime_ms")
    peers = None if theirs is None else _median(theirs, "downtime_ms")
    if downtime is not None and peers is not None:
        value = f"{downtime:.1f} ms against {peers:.1f} ms"
        lines.append(_line("downtime no worse than QEMU's own", downtime <= peers, value))
    progress, wait = _median(ours, "progress"), _median(ours, "spill_stall_ms")
    if progress is not None:
        room = "had room" if not wait else f"was full, the guest waited {wait:.0f} ms"
        lines.append(
            _line("progress at least 85 %", progress >= 0.85, f"{progress:.0%}, the spill {room}")
        )
    return lines


def _durable(ours: MethodResult, theirs: MethodResult | None) -> list[str]:
    time = _median(ours, "durable_s")
    peers = None if theirs is None else _median(theirs, "durable_s")
    if time is None or peers is None:
        return []
    value = f"{time:.2f} s against {peers:.2f} s"
    return [_line("durable in half of QEMU's own time", time <= peers / 2, value)]
