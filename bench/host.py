"""Facts about the host, and the parsing of number lists, for all benchmarks."""

from __future__ import annotations

import os
import platform
from typing import Any


def host_facts() -> dict[str, Any]:
    """Describe the host that the figures come from."""
    return {
        "kernel": platform.release(),
        "processors": len(os.sched_getaffinity(0)),
        "memory_mib": os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") >> 20,
        "python": platform.python_version(),
        "load_average": os.getloadavg(),
    }


def numbers(text: str) -> list[int]:
    """Parse an option's value such as ``256,1024``.

    Raises:
        ValueError: it is not such a list.
    """
    return [int(part) for part in text.split(",")]
