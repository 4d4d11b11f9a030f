"""The results as plain text."""

from __future__ import annotations

from collections.abc import Sequence

from bench.case import CaseResult
from bench.figures import Spread

_COLUMNS = (
    # title, figure, factor, digits
    ("downtime ms", "downtime_ms", 1.0, 1),
    ("gap ms", "gap_max_ms", 1.0, 1),
    ("stall< ms", "stall_max_ms", 1.0, 1),
    ("progress %", "progress", 100.0, 0),
    ("lost s", "lost_s", 1.0, 2),
    ("durable s", "durable_s", 1.0, 2),
    ("file MiB", "file_mib", 1.0, 0),
    ("written MiB", "written_mib", 1.0, 0),
    ("memory MiB", "peak_mib", 1.0, 0),
    ("CPU s", "cpu_s", 1.0, 2),
    ("spill MiB", "spill_peak_mib", 1.0, 0),
    ("spill wait ms", "spill_stall_ms", 1.0, 1),
)


def _spread_text(spread: Spread | None, factor: float, digits: int) -> str:
    if spread is None:
        return "-"
    values = (spread.median, spread.least, spread.greatest)
    median, least, greatest = (f"{value * factor:.{digits}f}" for value in values)
    return median if least == greatest else f"{median} [{least} {greatest}]"


def _grid(rows: Sequence[Sequence[str]]) -> list[str]:
    widths = [max(len(row[i]) for row in rows) for i in range(len(rows[0]))]
    return [
        "  ".join(
            [row[0].ljust(widths[0])]
            + [c.rjust(w) for c, w in zip(row[1:], widths[1:], strict=True)]
        )
        for row in rows
    ]


def case_table(result: CaseResult, peer: str) -> str:
    """One case: a line per method with median [least greatest], then ours over QEMU's own."""
    case = result.case
    rate = "full speed" if case.rate_mib_per_s == 0 else f"{case.rate_mib_per_s} MiB/s"
    lines = [
        f"{case.ram_mib} MiB of RAM ({case.memory}, {case.accelerator}), {case.populate_mib} MiB"
        f" of {case.fill} data, {rate} written over {case.mem_mib} MiB"
    ]
    rows = [["", *(title for title, *_ in _COLUMNS)]]
    for name, method in result.methods.items():
        cells = [_spread_text(method.spreads.get(f), k, d) for _, f, k, d in _COLUMNS]
        rows.append([name, *cells])
    for name, method in result.methods.items():
        if method.ratios:
            shown = (method.ratios.get(figure) for _, figure, _, _ in _COLUMNS)
            cells = ["" if ratio is None else f"{ratio:.2f}" for ratio in shown]
            rows.append([f"{name} / {peer}", *cells])
    lines += _grid(rows)
    free = [
        repetition.free_gap_max_ms
        for method in result.methods.values()
        for repetition in method.repetitions
    ]
    if free:
        lines.append(
            f"left alone, the guest itself saw gaps of up to {max(free):.1f} ms"
            f" (least {min(free):.1f}): this host's own noise"
        )
    for name, method in result.methods.items():
        lines += [f"{name} failed: {failure}" for failure in method.failures]
    lines += [audit for audit in result.audits if not audit.startswith("audit ok")]
    if result.failure:
        lines.append(f"the case failed: {result.failure}")
    return "\n".join(lines)
