"""A libvirt domain's downtime, from QEMU's STOP and RESUME events and their own timestamps."""

from __future__ import annotations

import threading
import time
from typing import Any

import libvirt
import libvirt_qemu

from stillframe.errors import MachineError

_PATIENCE_S = 10.0


class DomainEvents:
    """A watch over one domain's events, until the process ends."""

    def __init__(self, uri: str, name: str) -> None:
        self._news = threading.Condition()
        self._moments: list[tuple[str, float]] = []
        libvirt.virEventRegisterDefaultImpl()
        self._connection = libvirt.open(uri)
        domain = self._connection.lookupByName(name)
        libvirt_qemu.qemuMonitorEventRegister(self._connection, domain, None, self._note, None)
        threading.Thread(target=self._run, name="domain-events", daemon=True).start()

    def _run(self) -> None:
        while True:
            libvirt.virEventRunDefaultImpl()

    def _note(self, _connection: Any, _domain: Any, event: str, s: int, us: int, *_: Any) -> None:
        with self._news:
            self._moments.append((event, s + us / 1e6))
            self._news.notify_all()

    def stopped_ms(self, since_s: float) -> float:
        """Return the length of the guest's first stop after a moment of the wall clock.

        Raises:
            MachineError: the guest did not stop and resume.
        """

        def found(name: str, after_s: float) -> float | None:
            return next((s for event, s in self._moments if event == name and s >= after_s), None)

        deadline = time.monotonic() + _PATIENCE_S
        with self._news:
            while True:
                stop = found("STOP", since_s)
                resume = found("RESUME", stop) if stop is not None else None
                if stop is not None and resume is not None:
                    return (resume - stop) * 1e3
                if not self._news.wait(max(0.0, deadline - time.monotonic())):
                    raise MachineError("the domain did not stop and go on")
