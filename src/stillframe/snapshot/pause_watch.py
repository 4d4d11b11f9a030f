"""The check that the guest stood still for as long as the instant needs it to.

The VM may have other clients: a ``cont`` over another monitor, or a wake-up, while we save its
state would make RAM newer than the devices. Events arrive in order on our connection, so none is
missed.
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
"""Events between the run state query and our stop after which the guest was already stopped, so
that we must not continue it."""


class PauseWatch:
    """A watch over one stop; make it right before the stop."""

    def __init__(self, watch: Watch) -> None:
        self._watch = watch
        self._seen_before = len(watch.seen())

    def _events(self) -> list[MachineEvent]:
        return self._watch.seen()[self._seen_before :]

    def drain_ms(self, stop_ms: float) -> float:
        """Return how much of ``stop`` was spent draining requests in flight; call it when the
        answer arrives. The STOP event comes when the vCPUs stand still, the answer when the disks
        do."""
        now_s = time.monotonic()
        stops = [event.received_s for event in self._events() if event.name == _STOPPED]
        return min(stop_ms, (now_s - stops[0]) * 1e3) if stops else 0.0

    def broken(self) -> bool:
        """Return whether the guest was resumed by another client; we must not leave it stopped."""
        return any(event.name in _RAN for event in self._events())

    def check(self, also: tuple[str, ...] = ()) -> None:
        """Check the events so far; call it after the machine's last answer, before our ``cont``.

        Raises:
            SnapshotFailed: the guest ran meanwhile, or had stopped by itself, or an event in
                ``also`` happened.
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
        """Check the events before our own ``cont`` took effect; call it after its answer.

        Raises:
            SnapshotFailed: an event in ``also`` happened.
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
