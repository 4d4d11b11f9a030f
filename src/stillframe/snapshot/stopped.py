"""``--mode stop``: the VM stands still while all of its RAM is saved.

For machines whose RAM cannot be write-protected; never chosen automatically.
"""

from __future__ import annotations

import time
from collections.abc import Callable

from stillframe.disks.point_in_time import Disks
from stillframe.machine import Machine
from stillframe.model import Downtime
from stillframe.snapshot import faultpoints
from stillframe.snapshot.guard import Guarding
from stillframe.snapshot.instant import LIVE_STATES, Instant, stop_unless_still
from stillframe.snapshot.pause_watch import PauseWatch


def hold_still(
    machine: Machine,
    guard: Guarding,
    pause_watch: PauseWatch,
    *,
    run_state: str,
    disks: Disks,
    with_devices: bool = True,
) -> tuple[Instant, Callable[[], Downtime]]:
    """Stop the guest, save its device state and fix its disks.

    Returns:
        The instant, and a function that lets the guest go on and returns the downtime. Call it on
        every path; only the first call has an effect.

    Raises:
        StillframeError: something failed; the guest goes on.
    """
    was_live = run_state in LIVE_STATES
    began = time.monotonic()
    stop_ms = drain_ms = disks_ms = devices_ms = 0.0
    ended: list[Downtime] = []

    def resume() -> Downtime:
        if ended:
            return ended[0]
        saved = time.monotonic()
        if was_live or pause_watch.broken():
            machine.resume_at_all_costs()
        guard.disarm()
        now = time.monotonic()
        # The rest of the time went into copying; it takes the place of protecting.
        ended.append(
            Downtime(
                stop_ms=stop_ms - drain_ms,
                drain_ms=drain_ms,
                devices_ms=devices_ms,
                disks_ms=disks_ms,
                protect_ms=(saved - began) * 1e3 - stop_ms - disks_ms - devices_ms,
                cont_ms=(now - saved) * 1e3,
            )
        )
        return ended[0]

    if was_live:
        guard.arm()
    try:
        stop_unless_still(machine, run_state)
        stop_ms = (time.monotonic() - began) * 1e3
        drain_ms = pause_watch.drain_ms(stop_ms)
        faultpoints.reach("stopped")
        device_state = machine.save_device_state(disks.command()) if with_devices else b""
        pause_watch.check()
        devices_ms = (time.monotonic() - began) * 1e3 - stop_ms
        faultpoints.reach("devices")
        disks.in_stop()
        disks_ms = (time.monotonic() - began) * 1e3 - stop_ms - devices_ms
        faultpoints.reach("disks")
    except BaseException:
        resume()
        raise
    return Instant(device_state=device_state, downtime=Downtime(), writes=()), resume
