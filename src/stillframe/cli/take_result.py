"""The final output of ``take``."""

from __future__ import annotations

from typing import TYPE_CHECKING

from stillframe.cli.output import as_object
from stillframe.cli.quantities import format_bytes, format_ms
from stillframe.cli.text import facts, printable

if TYPE_CHECKING:
    from stillframe.api import TakenSnapshot
    from stillframe.model import Statistics


def as_json_object(taken: TakenSnapshot) -> dict[str, object]:
    """Return the object that ``take --json`` shows (docs/reference/json.md)."""
    data: dict[str, object] = as_object(taken)
    statistics: dict[str, object] = as_object(taken.statistics)
    del data["statistics"]
    return data | statistics


def as_lines(taken: TakenSnapshot) -> list[str]:
    """Return the same as text."""
    numbers = taken.statistics
    lines = facts(
        [
            ("snapshot", taken.file),
            ("id", taken.id),
            ("took", _times(numbers)),
            ("file", _file(numbers)),
            *statistics_facts(numbers),
        ]
    )
    return [*lines, *(f"note: {printable(note)}" for note in taken.notes)]


def statistics_facts(numbers: Statistics) -> list[tuple[str, str]]:
    """Return a job's numbers as names and values."""
    pages, downtime = numbers.pages, numbers.downtime
    parts = (
        f" (stop {downtime.stop_ms:.1f}, drain {downtime.drain_ms:.1f},"
        f" devices {downtime.devices_ms:.1f}, disks {downtime.disks_ms:.1f},"
        f" protect {downtime.protect_ms:.1f}, cont {downtime.cont_ms:.1f})"
    )
    found = [
        ("downtime", format_ms(numbers.downtime_ms) + (parts if downtime.total_ms else "")),
        (
            "pages",
            f"{pages.total}: {pages.data} data, {pages.zero} zero"
            f" ({pages.never_populated} never populated), {pages.faulted} faulted"
            + (f", {pages.unchanged} as in the parent" if pages.unchanged else ""),
        ),
    ]
    if numbers.spill_limit_bytes:  # otherwise the VMM itself served any faults
        found += [
            (
                "faults",
                f"{numbers.faults}: median {numbers.fault_p50_us:.0f} µs,"
                f" 99 % within {numbers.fault_p99_us:.0f} µs,"
                f" longest {numbers.fault_max_us:.0f} µs",
            ),
            (
                "spill",
                f"at most {format_bytes(numbers.spill_peak_bytes)};"
                f" the guest waited {format_ms(numbers.stall_ms)} for it",
            ),
        ]
    written = sum(write.length_bytes for write in numbers.writes_while_stopped)
    if written:
        names = sorted({write.idstr for write in numbers.writes_while_stopped})
        found.append(
            ("written while stopped", f"{format_bytes(written)} in {', '.join(names)} (included)")
        )
    return found


def _times(numbers: Statistics) -> str:
    return f"{format_ms(numbers.total_ms)}, of which arming {format_ms(numbers.arm_ms)}"


def _file(numbers: Statistics) -> str:
    ratio = numbers.ram_bytes / numbers.file_bytes if numbers.file_bytes else 0.0
    return (
        f"{format_bytes(numbers.file_bytes)} for {format_bytes(numbers.ram_bytes)} of RAM"
        f" ({ratio:.1f} to 1)"
    )
