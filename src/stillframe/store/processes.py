"""The identity of a process: whether a pid still means the same one."""

from __future__ import annotations

from pathlib import Path


def start_ticks(pid: int) -> int:
    """Return when a process started, in clock ticks since boot; 0 if it has ended (proc(5):
    stat)."""
    try:
        fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    except OSError:
        return 0
    return 0 if fields[0] in "ZX" else int(fields[19])
