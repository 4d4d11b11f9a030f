"""Whether the guest stood still for as long as the instant needs it to.

Others may use the VM: a ``cont`` over another monitor, or a wake-up, while we save its state would
make RAM newer than the devices. Events come in order on our connection, so none is missed.
"""

from __future__ import annotations

from collections.abc import Sequence

from stillframe.errors import SnapshotFailed
from stillframe.machine import MachineEvent, Watch

_RESUMED = "RESUME"
_RAN = (_RESUMED, "WAKEUP")


class Standstill:
    """Begins when it is made: right before the stop."""

    def __init__(self, watch: Watch) -> None:
        self._watch = watch
        self._seen_before = len(watch.seen())

    def _events(self) -> list[MachineEvent]:
        return self._watch.seen()[self._seen_before :]

    def broken(self) -> bool:
        """Whether somebody else let the guest go on: then it must not be left stopped by us."""
        return any(event.name in _RAN for event in self._events())

    def check(self, also: tuple[str, ...] = ()) -> None:
        """To be called after the last answer of the machine, and before our own ``cont``.

        Raises:
            SnapshotFailed: the guest ran meanwhile, or what ``also`` names happened.
        """
        self._refuse(self._events(), (*_RAN, *also))

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
