"""What every benchmark tells of the host, and how it takes lists of numbers."""

from __future__ import annotations

import os
import platform
from typing import Any


def host_facts() -> dict[str, Any]:
    """The machine that the figures are of."""
    return {
        "kernel": platform.release(),
        "processors": len(os.sched_getaffinity(0)),
        "memory_mib": os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") >> 20,
        "python": platform.python_version(),
        "load_average": os.getloadavg(),
    }


def numbers(text: str) -> list[int]:
    """``256,1024`` as an option's value.

    Raises:
        ValueError: it is something else.
    """
    return [int(part) for part in text.split(",")]
