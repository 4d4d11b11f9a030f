"""The results on boards as plain text, and compared with the project's targets."""

from __future__ import annotations

from collections.abc import Sequence

from bench.board_case import PEER, BoardCaseResult
from bench.table import grid, spread_text

_LINES = (
    # title, figure, factor, digits
    ("downtime by events, ms", "downtime_ms", 1.0, 2),
    ("downtime by its own account, ms", "own_downtime_ms", 1.0, 2),
    ("  stop, ms", "stop_ms", 1.0, 2),
    ("  devices, ms", "devices_ms", 1.0, 2),
    ("  protect, ms", "protect_ms", 1.0, 2),
    ("  cont, ms", "cont_ms", 1.0, 2),
    ("longest gap in the guest, ms", "gap_max_ms", 1.0, 1),
    ("guest progress, %", "progress", 100.0, 0),
    ("guest had no CPU, %", "cpu_wait", 100.0, 0),
    ("durable after, s", "durable_s", 1.0, 2),
    ("file, MiB", "file_mib", 1.0, 0),
    ("written, MiB", "written_mib", 1.0, 0),
    ("memory, MiB", "peak_mib", 1.0, 0),
    ("faults", "faults", 1.0, 0),
)
_RATIOS = ("downtime_ms", "gap_max_ms", "progress", "durable_s", "file_mib", "peak_mib")
_AIM_DOWNTIME_MS = 2.0
_AIM_PROGRESS = 0.7


def _title(result: BoardCaseResult) -> str:
    case = result.case
    rate = f"{case.rate_mib_per_s} MiB/s" if case.rate_mib_per_s else "full speed"
    words = "every word of a page" if case.whole else "three words of a page"
    return f"{case.ram_mib} MiB of RAM, {result.populated_mib:.0f} populated; {rate}, {words}"


def case_table(result: BoardCaseResult) -> str:
    """Format one case: a column per method with median [min max], and the ratios to ``PEER``."""
    rows = [["", *result.methods]]
    for title, figure, factor, digits in _LINES:
        cells = (
            spread_text(method.spreads.get(figure), factor, digits)
            for method in result.methods.values()
        )
        rows.append([title, *cells])
    lines = [_title(result), *grid(rows)]
    compared = {name: m.ratios for name, m in result.methods.items() if m.ratios}
    if compared:
        rows = [[f"medians over those of {PEER}", *compared]]
        for title, figure, _, _ in _LINES:
            if figure in _RATIOS:
                ratios = (of_method.get(figure) for of_method in compared.values())
                cells = ("-" if ratio is None else f"{ratio:.3f}" for ratio in ratios)
                rows.append([title.partition(",")[0], *cells])
        lines += grid(rows)
    every = [r for method in result.methods.values() for r in method.repetitions]
    if every:
        gaps = [repetition.free_gap_max_ms for repetition in every]
        waits = [repetition.free_cpu_wait * 100 for repetition in every]
        loads = [repetition.load for repetition in every]
        lines.append(
            f"left alone, the guest saw gaps of {min(gaps):.1f} to {max(gaps):.1f} ms and had no"
            f" CPU for {min(waits):.0f} to {max(waits):.0f} % of the time; load"
            f" {min(loads):.1f} to {max(loads):.1f}: this host's own noise"
        )
    for name, method in result.methods.items():
        lines += [f"{name} failed: {failure}" for failure in method.failures]
    lines += [audit for audit in result.audits if not audit.startswith("AUDIT ok")]
    if result.failure:
        lines.append(f"the case failed: {result.failure}")
    return "\n".join(lines)


def targets_text(results: Sequence[BoardCaseResult]) -> str:
    """Return a line for each target and each case and inside method that it concerns. A missed
    target has no effect."""
    lines = ["Targets (medians):"]
    for result in results:
        for name in ("inside", "inside-mprotect"):
            method = result.methods.get(name)
            if method is None or "own_downtime_ms" not in method.spreads:
                continue
            downtime = method.spreads["own_downtime_ms"].median
            progress = method.spreads["progress"].median
            lines.append(f" {_title(result)}, {name}:")
            lines.append(
                f"  downtime below {_AIM_DOWNTIME_MS:g} ms: {downtime:.2f} ms"
                f" ({_word(downtime < _AIM_DOWNTIME_MS)})"
            )
            lines.append(
                f"  progress at least {_AIM_PROGRESS:.0%}: {progress:.0%}"
                f" ({_word(progress >= _AIM_PROGRESS)})"
            )
    return "\n".join(lines)


def _word(reached: bool) -> str:
    return "reached" if reached else "NOT reached"
