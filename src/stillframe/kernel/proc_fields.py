"""Numbers by name, as ``/proc/meminfo``, ``/proc/PID/status`` and ``memory.stat`` list them."""

from __future__ import annotations

from pathlib import Path


def read_fields(path: Path, separator: str = ":") -> dict[str, int]:
    """Read numbers by name from lines such as ``MemFree: 12 kB``; none if the file cannot be
    read."""
    try:
        lines = path.read_text().splitlines()
    except OSError:
        return {}
    found = {}
    for line in lines:
        name, _, rest = line.partition(separator)
        words = rest.split()
        if words and words[0].isdigit():
            found[name] = int(words[0])
    return found
