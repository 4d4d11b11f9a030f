"""Waits for what somebody else does."""

from __future__ import annotations

import time
from collections.abc import Callable


def wait_until(
    condition: Callable[[], object],
    otherwise: str = "it did not come to be",
    *,
    within_s: float = 60.0,
) -> None:
    """Ask again and again; AssertionError if it does not come true in time."""
    deadline_s = time.monotonic() + within_s
    while not condition():
        assert time.monotonic() < deadline_s, otherwise
        time.sleep(0.005)
