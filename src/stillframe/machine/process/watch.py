"""The events of a VM during a snapshot, as its monitor reports them.

MIGRATION events come only if the capability ``events`` is on, and free page reporting sends no
event at all; the kernel's own events and ``blocks_signature`` show what the monitor does not.
"""

from __future__ import annotations

import threading

from stillframe.machine import MachineEvent
from stillframe.qmp.client import QmpClient
from stillframe.qmp.events import QmpEvent

_OF_INTEREST = frozenset(
    {
        "BALLOON_CHANGE",
        "BLOCK_IO_ERROR",
        "DEVICE_DELETED",
        "GUEST_PANICKED",
        "MEMORY_DEVICE_SIZE_CHANGE",
        "MIGRATION",
        "MIGRATION_PASS",
        "POWERDOWN",
        "RESET",
        "RESUME",
        "SHUTDOWN",
        "STOP",
        "SUSPEND",
        "WAKEUP",
        "WATCHDOG",
    }
)
"""QEMU ``qapi/run-state.json``, ``migration.json``, ``machine.json``, ``qdev.json``."""


class MonitorWatch:
    """A collector of one monitor's relevant events, until ``close``."""

    def __init__(self, qmp: QmpClient) -> None:
        self._lock = threading.Lock()
        self._seen: list[MachineEvent] = []
        self._unsubscribe = qmp.subscribe(self._note)

    def _note(self, event: QmpEvent) -> None:
        if event.name == "BLOCK_IO_ERROR" and event.data.get("action") != "stop":
            return  # the guest sees the error, and runs on
        if event.name in _OF_INTEREST:
            with self._lock:
                self._seen.append(
                    MachineEvent(
                        name=event.name, data=dict(event.data), received_s=event.received_s
                    )
                )

    def seen(self) -> list[MachineEvent]:
        """Return the events so far, oldest first; they stay in the list."""
        with self._lock:
            return list(self._seen)

    def close(self) -> None:
        """Stop watching; never raises."""
        self._unsubscribe()
