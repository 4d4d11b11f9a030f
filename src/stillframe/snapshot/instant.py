"""The downtime: stop, device state, protection, cont. Nothing here grows with RAM or disk.

Order (invariant 8, QEMU ``migration/migration.c``: bg_migration_thread): RAM is protected
before the device state is saved, so what the VMM writes to RAM meanwhile is seen, belongs to the
instant, and is protected again before the guest goes on.
"""

from __future__ import annotations

import time

import msgspec

from stillframe.machine import Machine
from stillframe.memory.ram_capture import RamCapture
from stillframe.model import Downtime, StoppedWrite
from stillframe.snapshot import faultpoints
from stillframe.snapshot.guard import Guarding
from stillframe.snapshot.standstill import Standstill

_RESET = ("RESET",)


class Instant(msgspec.Struct, frozen=True, kw_only=True):
    """What was fixed in the downtime."""

    device_state: bytes
    downtime: Downtime
    writes: tuple[StoppedWrite, ...]


class _Laps:
    def __init__(self) -> None:
        self._last = time.monotonic()

    def lap_ms(self) -> float:
        now = time.monotonic()
        passed, self._last = (now - self._last) * 1e3, now
        return passed


def stop_unless_still(machine: Machine, run_state: str) -> None:
    """Stop a guest that runs, or is paused: there it does nothing, unless somebody just resumed it.

    Other states (suspended, io-error, ...) are left alone: QEMU from 9.0 on would make a suspended
    guest a paused one.
    """
    if run_state in ("running", "paused"):
        machine.stop()


def take_instant(
    machine: Machine,
    guard: Guarding,
    ram: RamCapture,
    standstill: Standstill,
    *,
    run_state: str,
) -> Instant:
    """Stop the guest, fix the instant, let it go on.

    Args:
        run_state: the guest's, just asked for. One that does not run is left in its state.

    Raises:
        StillframeError: something failed; the guest goes on, unprotected.
    """
    was_running = run_state == "running"
    if was_running:
        guard.arm()
    try:
        instant = _in_downtime(machine, ram, standstill, run_state)
    except BaseException:
        # Un-protect first: a thread of the VMM that waits for a fault may hold the lock
        # that the monitor needs.
        ram.release()
        if was_running or standstill.broken():
            machine.resume_at_all_costs()
            guard.disarm()
        raise
    guard.disarm()
    return instant


def _in_downtime(
    machine: Machine, ram: RamCapture, standstill: Standstill, run_state: str
) -> Instant:
    laps = _Laps()
    stop_unless_still(machine, run_state)
    stop_ms = laps.lap_ms()
    faultpoints.reach("stopped")
    ram.protect_written()
    protect_ms = laps.lap_ms()
    device_state = machine.save_device_state()
    standstill.check(also=_RESET)
    devices_ms = laps.lap_ms()
    faultpoints.reach("devices")
    writes = ram.instant()
    protect_ms += laps.lap_ms()
    faultpoints.reach("protected")
    # Up to now RAM could still be written unseen, by a guest or a reset.
    standstill.check(also=_RESET)
    if run_state == "running":
        machine.cont()
        # With the answer have come events that were on their way.
        standstill.check_until_resumed(also=_RESET)
    return Instant(
        device_state=device_state,
        downtime=Downtime(
            stop_ms=stop_ms,
            devices_ms=devices_ms,
            protect_ms=protect_ms,
            cont_ms=laps.lap_ms(),
        ),
        writes=writes,
    )
