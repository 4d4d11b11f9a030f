"""The results as plain text."""

from __future__ import annotations

from collections.abc import Sequence

from bench.case import CaseResult
from bench.figures import Spread

_LINES = (
    # title, figure, factor, digits
    ("downtime, ms", "downtime_ms", 1.0, 1),
    ("longest gap in the guest, ms", "gap_max_ms", 1.0, 1),
    ("longest stall, at most, ms", "stall_max_ms", 1.0, 1),
    ("guest progress, %", "progress", 100.0, 0),
    ("guest had no CPU, %", "cpu_wait", 100.0, 0),
    ("guest time lost, s", "lost_s", 1.0, 2),
    ("durable after, s", "durable_s", 1.0, 2),
    ("file, MiB", "file_mib", 1.0, 0),
    ("written, MiB", "written_mib", 1.0, 0),
    ("memory, MiB", "peak_mib", 1.0, 0),
    ("CPU time, s", "cpu_s", 1.0, 2),
    ("spill peak, MiB", "spill_peak_mib", 1.0, 0),
    ("waited for spill, ms", "spill_stall_ms", 1.0, 1),
)


def spread_text(spread: Spread | None, factor: float, digits: int) -> str:
    """Format a spread, times a factor, as ``median [min max]``; ``-`` for none."""
    if spread is None:
        return "-"
    values = (spread.median, spread.least, spread.greatest)
    median, least, greatest = (f"{value * factor:.{digits}f}" for value in values)
    return median if least == greatest else f"{median} [{least} {greatest}]"


def grid(rows: Sequence[Sequence[str]]) -> list[str]:
    """Return the lines of a table, the first column left-aligned, the others right-aligned."""
    widths = [max(len(row[i]) for row in rows) for i in range(len(rows[0]))]
    return [
        "  ".join(
            [row[0].ljust(widths[0])]
            + [cell.rjust(width) for cell, width in zip(row[1:], widths[1:], strict=True)]
        )
        for row in rows
    ]


def case_table(result: CaseResult, peer: str) -> str:
    """Format one case: a column per method with median [min max], then our ratios to the peer."""
    case = result.case
    rate = "full speed" if case.rate_mib_per_s == 0 else f"{case.rate_mib_per_s} MiB/s"
    if case.rest_us:
        rate += f" with rests of {case.rest_us} us"
    lines = [
        f"{case.ram_mib} MiB of RAM ({case.memory}, {case.accelerator}), {case.populate_mib} MiB"
        f" of {case.fill} data, {rate} written over {case.mem_mib} MiB; {result.qemu_version}"
    ]
    compared = [name for name, method in result.methods.items() if method.ratios]
    rows = [["", *result.methods, *(f"{name}/{peer}" for name in compared)]]
    for title, figure, factor, digits in _LINES:
        cells = [
            spread_text(method.spreads.get(figure), factor, digits)
            for method in result.methods.values()
        ]
        for name in compared:
            ratio = result.methods[name].ratios.get(figure)
            cells.append("" if ratio is None else f"{ratio:.2f}")
        rows.append([title, *cells])
    lines += grid(rows)
    every = [r for method in result.methods.values() for r in method.repetitions]
    if every:
        gaps = [repetition.free_gap_max_ms for repetition in every]
        waits = [repetition.free_cpu_wait * 100 for repetition in every]
        lines.append(
            f"left alone, the guest saw gaps of {min(gaps):.1f} to {max(gaps):.1f} ms and had no"
            f" CPU for {min(waits):.0f} to {max(waits):.0f} % of the time: this host's own noise"
        )
    for name, method in result.methods.items():
        lines += [f"{name} failed: {failure}" for failure in method.failures]
    lines += [audit for audit in result.audits if not audit.startswith("audit ok")]
    if result.failure:
        lines.append(f"the case failed: {result.failure}")
    return "\n".join(lines)
