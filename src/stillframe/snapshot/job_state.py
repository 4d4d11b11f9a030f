"""The state of a job: a snapshot, or a migration out of a board or into it.

Source of the names: QEMU ``qapi/migration.json``: MigrationStatus.
"""

from __future__ import annotations

import threading
from collections.abc import Callable
from typing import Final

from stillframe.model import JobState

UNDER_WAY: Final[frozenset[JobState]] = frozenset(
    ("setup", "active", "postcopy-active", "device", "cancelling")
)
_MAY_BE_CANCELLED = ("none", "setup", "active", "device")


class StateMachine:
    """One job's state. Changes are atomic, and reported in order.

    Args:
        tell: called with each new state, in the thread that made the change; it must be quick and
            must not change the state.
    """

    def __init__(self, tell: Callable[[JobState], None] | None = None) -> None:
        self._tell = tell
        self._lock = threading.Lock()
        self._value: JobState = "none"
        self._committed = False

    @property
    def value(self) -> JobState:
        return self._value

    @property
    def under_way(self) -> bool:
        return self._value in UNDER_WAY

    def _change(self, new: JobState) -> None:
        if new != self._value:
            self._value = new
            if self._tell is not None:
                self._tell(new)

    def enter(self, new: JobState) -> bool:
        """Enter a state; return False if the job was cancelled or has ended."""
        with self._lock:
            if self._value != "none" and self._value not in UNDER_WAY - {"cancelling"}:
                return False
            self._change(new)
            return True

    def cancel(self) -> bool:
        """Cancel, unless past the point of no return; return whether it will end as cancelled."""
        with self._lock:
            if self._value in _MAY_BE_CANCELLED and not self._committed:
                self._change("cancelling")
            return self._value in ("cancelling", "cancelled")

    def commit(self) -> bool:
        """Pass the point of no return, after which ``cancel`` fails; False if cancelled before."""
        with self._lock:
            self._committed = self._value not in ("cancelling", "cancelled")
            return self._committed

    def end(self, *, failed: bool) -> JobState:
        """Enter the final state, ``cancelled`` if the job failed after a cancel; a final state
        stays as it is. Return the state."""
        with self._lock:
            if self._value == "cancelling" and failed:
                self._change("cancelled")
            elif self._value == "none" or self._value in UNDER_WAY:
                self._change("failed" if failed else "completed")
            return self._value
