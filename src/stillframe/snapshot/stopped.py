"""``--mode stop``: the VM stands still while all of its RAM is saved.

For machines whose RAM cannot be write-protected, and only when asked for.
"""

from __future__ import annotations

import time
from collections.abc import Callable

from stillframe.machine import Machine
from stillframe.model import Downtime
from stillframe.snapshot import faultpoints
from stillframe.snapshot.guard import Guarding
from stillframe.snapshot.instant import Instant, stop_unless_still
from stillframe.snapshot.standstill import Standstill


def hold_still(
    machine: Machine, guard: Guarding, standstill: Standstill, *, run_state: str
) -> tuple[Instant, Callable[[], Downtime]]:
    """Stop the guest and save its device state.

    Returns:
        The instant, and how to let the guest go on: call it on every path, twice does nothing;
        it gives the downtime.

    Raises:
        StillframeError: it failed; the guest goes on.
    """
    was_running = run_state == "running"
    began = time.monotonic()
    stop_ms = devices_ms = 0.0
    ended: list[Downtime] = []

    def resume() -> Downtime:
        if ended:
            return ended[0]
        saved = time.monotonic()
        if was_running or standstill.broken():
            machine.resume_at_all_costs()
        guard.disarm()
        now = time.monotonic()
        # All that passed in between is copying; it stands where protecting would.
        ended.append(
            Downtime(
                stop_ms=stop_ms,
                devices_ms=devices_ms,
                protect_ms=(saved - began) * 1e3 - stop_ms - devices_ms,
                cont_ms=(now - saved) * 1e3,
            )
        )
        return ended[0]

    if was_running:
        guard.arm()
    try:
        stop_unless_still(machine, run_state)
        stop_ms = (time.monotonic() - began) * 1e3
        faultpoints.reach("stopped")
        device_state = machine.save_device_state()
        standstill.check()
        devices_ms = (time.monotonic() - began) * 1e3 - stop_ms
        faultpoints.reach("devices")
    except BaseException:
        resume()
        raise
    return Instant(device_state=device_state, downtime=Downtime(), writes=()), resume
