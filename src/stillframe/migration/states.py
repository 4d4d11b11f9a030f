"""States of a migration, in QEMU's words (``qapi/migration.json``: MigrationStatus)."""

from __future__ import annotations

import threading
from collections.abc import Callable, Collection, Iterable
from typing import Literal

MigrationStatus = Literal[
    "none",
    "setup",
    "active",
    "postcopy-active",
    "device",
    "completed",
    "failed",
    "cancelling",
    "cancelled",
]

Tell = Callable[[str, dict[str, object]], None]
"""Takes an event's name and data; it must be quick and not call back."""

UNDER_WAY: Collection[MigrationStatus] = frozenset(
    ("setup", "active", "postcopy-active", "device", "cancelling")
)


class StatusCell:
    """One side's state. Changes are atomic, and told in their order.

    Args:
        tell: called with each new state, by the thread that made the change; it must be quick
            and must not change the state.
    """

    def __init__(self, tell: Callable[[MigrationStatus], None]) -> None:
        self._tell = tell
        self._lock = threading.Lock()
        self._value: MigrationStatus = "none"
        self._final = False

    @property
    def value(self) -> MigrationStatus:
        return self._value

    @property
    def under_way(self) -> bool:
        return self._value in UNDER_WAY

    def change(self, new: MigrationStatus, *, only_from: Iterable[MigrationStatus]) -> bool:
        """Enter a state, unless another thread has changed it meanwhile."""
        with self._lock:
            if self._value not in only_from or (self._final and new == "cancelling"):
                return False
            self._value = new
            self._tell(new)
            return True

    def end(self, *, failed: bool) -> MigrationStatus:
        """Enter the last state, and give it: ``cancelled`` if it was cancelled before."""
        with self._lock:
            if self._value == "cancelling":
                self._value = "cancelled"
            else:
                self._value = "failed" if failed else "completed"
            self._tell(self._value)
            return self._value

    def make_final(self) -> bool:
        """From now on it cannot be cancelled; False if it was already."""
        with self._lock:
            self._final = self._value not in ("cancelling", "cancelled")
            return self._final
