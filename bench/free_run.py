"""Free runs: the undisturbed guest between two saves."""

from __future__ import annotations

import msgspec

from bench.guest_view import GuestView, guest_view
from bench.methods import Subject


class FreeRun(msgspec.Struct, frozen=True, kw_only=True):
    """The undisturbed guest.

    ``stall_max_ms`` covers all the time since the guest's ``reset``. ``cpu_wait``: share of the
    time in which a vCPU was runnable but had no CPU.
    """

    view: GuestView
    stall_max_ms: float
    cpu_wait: float


def free_run(subject: Subject, seconds: float) -> FreeRun:
    """Leave the guest undisturbed for some seconds, and until its clocks have settled.

    Raises:
        MachineError: the guest does not tick.
    """
    vm = subject.vm
    since = vm.console.mark()
    start = vm.wait_tick()
    while True:
        vm.wait_tick()
        ticks = vm.ticks(since)
        last = ticks[-1]
        if last.received_s - start.received_s >= seconds and last.seconds >= start.seconds + 2:
            break
    view = guest_view(ticks, start.received_s + 1e-6, last.received_s)
    return FreeRun(
        view=view,
        stall_max_ms=max(last.stall_max_us, last.gap_max_us) / 1e3,
        cpu_wait=subject.cpu_wait.share(start.received_s, last.received_s),
    )
