"""The downtime: stop, device state, disks, protection, cont. No step grows with RAM or disk size.

Order (invariant 8, QEMU ``migration/migration.c``: bg_migration_thread): RAM is protected before
the device state is saved. So what the VMM writes to RAM meanwhile is seen, belongs to the instant,
and is protected again before the guest goes on.

The disks come after the device state: saving it drains all disks once more, and QEMU 7.2 to 10.0
can hang for good if a disk copy has just started at a drain.
"""

from __future__ import annotations

import time

import msgspec

from stillframe.capture.ram_capture import RamCapture
from stillframe.disks.point_in_time import Disks, NoDisks
from stillframe.machine import Machine
from stillframe.model import Downtime, StoppedWrite
from stillframe.snapshot import faultpoints
from stillframe.snapshot.guard import Guarding
from stillframe.snapshot.pause_watch import PauseWatch

_RESET = ("RESET",)
_NO_DISKS = NoDisks()


class Instant(msgspec.Struct, frozen=True, kw_only=True):
    """The result of the downtime: device state, timings, and the VMM's writes while stopped."""

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


LIVE_STATES = ("running", "suspended")
"""Run states that ``stop`` leaves and ``cont`` restores (QEMU >= 9.0, ``system/runstate.c``:
runstate_is_live). The pre-flight refuses a suspended guest of an older QEMU."""


def stop_unless_still(machine: Machine, run_state: str) -> None:
    """Stop a guest that is live or paused; a paused one may have been resumed by another client.

    Other run states (io-error, prelaunch, ...) are left alone. A suspended guest must be stopped,
    too: otherwise saving its device state would leave it in run state ``save-vm``.
    """
    if run_state in (*LIVE_STATES, "paused"):
        machine.stop()


def take_instant(
    machine: Machine,
    guard: Guarding,
    ram: RamCapture,
    pause_watch: PauseWatch,
    *,
    run_state: str,
    with_devices: bool = True,
    disks: Disks = _NO_DISKS,
) -> Instant:
    """Stop the guest, fix the instant, and let the guest go on.

    Args:
        with_devices: save the device state; without it the snapshot is for analysis only.
        disks: fixed together, once RAM is protected.
        run_state: the guest's, queried just before; it is restored afterwards.

    Raises:
        StillframeError: something failed; the guest goes on, unprotected.
    """
    was_live = run_state in LIVE_STATES
    if was_live:
        guard.arm()
    try:
        instant = _in_downtime(machine, ram, pause_watch, run_state, with_devices, disks)
    except BaseException:
        # Un-protect first: a VMM thread that waits for a fault may hold the lock that the
        # monitor needs.
        ram.release()
        if was_live or pause_watch.broken():
            machine.resume_at_all_costs()
            guard.disarm()
        raise
    guard.disarm()
    return instant


def _in_downtime(
    machine: Machine,
    ram: RamCapture,
    pause_watch: PauseWatch,
    run_state: str,
    with_devices: bool,
    disks: Disks,
) -> Instant:
    laps = _Laps()
    stop_unless_still(machine, run_state)
    stop_ms = laps.lap_ms()
    drain_ms = pause_watch.drain_ms(stop_ms)
    faultpoints.reach("stopped")
    ram.protect_written()
    protect_ms = laps.lap_ms()
    device_state = machine.save_device_state(disks.command()) if with_devices else b""
    pause_watch.check(also=_RESET)
    devices_ms = laps.lap_ms()
    faultpoints.reach("devices")
    disks.in_stop()
    disks_ms = laps.lap_ms()
    if run_state in LIVE_STATES:
        # Must follow the last other command: the VMM would forget it on one in between.
        machine.announce_cont()
    faultpoints.reach("disks")
    writes = ram.instant()
    protect_ms += laps.lap_ms()
    faultpoints.reach("protected")
    # Up to here a resumed guest or a reset could still write RAM unseen.
    pause_watch.check(also=_RESET)
    if run_state in LIVE_STATES:
        machine.cont()
        # Events that were in flight arrived with the answer.
        pause_watch.check_until_resumed(also=_RESET)
    return Instant(
        device_state=device_state,
        downtime=Downtime(
            stop_ms=stop_ms - drain_ms,
            drain_ms=drain_ms,
            devices_ms=devices_ms,
            disks_ms=disks_ms,
            protect_ms=protect_ms,
            cont_ms=laps.lap_ms(),
        ),
        writes=writes,
    )
