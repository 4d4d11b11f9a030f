"""Whether the guest stood still for as long as the instant needs it to.

Others may use the VM: a ``cont`` over another monitor, or a wake-up, while we save its state would
make RAM newer than the devices. Events come in order on our connection, so none is missed.
"""

from __future__ import annotations

import time
from collections.abc import Sequence

from stillframe.errors import SnapshotFailed
from stillframe.machine import MachineEvent, Watch

_STOPPED = "STOP"
_RESUMED = "RESUME"
_RAN = (_RESUMED, "WAKEUP")
_BY_ITSELF = ("BLOCK_IO_ERROR", "GUEST_PANICKED", "SHUTDOWN", "SUSPEND", "WATCHDOG")
"""Between the question for the run state and our stop: then the guest was not ours to stop, and is
not ours to continue."""


class PauseWatch:
    """Begins when it is made: right before the stop."""

    def __init__(self, watch: Watch) -> None:
        self._watch = watch
        self._seen_before = len(watch.seen())

    def _events(self) -> list[MachineEvent]:
        return self._watch.seen()[self._seen_before :]

    def drain_ms(self, stop_ms: float) -> float:
        """To be called at the answer to ``stop``: how much of it was waiting for requests in
        flight. The event comes when the vCPUs stand still, the answer when the disks do."""
        now_s = time.monotonic()
        stops = [event.received_s for event in self._events() if event.name == _STOPPED]
        return min(stop_ms, (now_s - stops[0]) * 1e3) if stops else 0.0

    def broken(self) -> bool:
        """Whether somebody else let the guest go on: then it must not be left stopped by us."""
        return any(event.name in _RAN for event in self._events())

    def check(self, also: tuple[str, ...] = ()) -> None:
        """To be called after the last answer of the machine, and before our own ``cont``.

        Raises:
            SnapshotFailed: the guest ran meanwhile, or had stopped by itself, or what ``also``
                names happened.
        """
        events = self._events()
        self._refuse(events, (*_RAN, *also))
        for event in events:
            if event.name in _BY_ITSELF:
                raise SnapshotFailed(
                    "the guest stopped by itself just before the snapshot",
                    why=event.name,
                    remedy="take another one",
                    guest_state="paused",
                )

    def check_until_resumed(self, also: tuple[str, ...]) -> None:
        """To be called after the answer to our own ``cont``: what happened before it.

        Raises:
            SnapshotFailed: what ``also`` names happened.
        """
        events = self._events()
        names = [event.name for event in events]
        ours = names.index(_RESUMED) if _RESUMED in names else len(names)
        self._refuse(events[:ours], also)

    def _refuse(self, events: Sequence[MachineEvent], names: tuple[str, ...]) -> None:
        for event in events:
            if event.name in names:
                raise SnapshotFailed(
                    "the snapshot would not show one instant",
                    why=f"somebody else let the guest go on or reset it ({event.name})",
                    remedy="take another one, with nobody else controlling the VM",
                    guest_state="unknown",
                )
