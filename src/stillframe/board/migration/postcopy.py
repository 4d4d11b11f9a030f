"""The switch-over to postcopy: the guest resumes at the destination, then its RAM follows,
requested pages first.

Source: QEMU ``migration/migration.c``: postcopy_start, migration_completion_postcopy.
"""

from __future__ import annotations

import io

from stillframe.board.migration.live import LiveTransfer, StoppedGuest, check_still, save_devices
from stillframe.board.migration.stream_commands import command, packaged, ping, ram_discard
from stillframe.snapshot import faultpoints
from stillframe.vmstate.wire import CommandCode

_PING_DISCARDED = 2
_PING_DEVICES = 3
_PING_PACKAGED = 4


def finish_in_postcopy(live: LiveTransfer) -> None:
    """Switch over, then send the remaining RAM; here the guest is stopped afterwards.

    Raises:
        StillframeError: it failed. Before the switch-over, the guest goes on here; after it, the
            guest is stopped here and lost at the destination.
    """
    task, counters = live.task, live.counters
    with StoppedGuest(live.board) as still:
        task.control.enter("device", "stopped")
        counters.stage = "downtime"
        faultpoints.reach("stopped")
        live.ram.in_postcopy = True
        package = io.BytesIO()
        # LISTEN first, so that the destination can request pages while it loads the devices.
        package.write(command(CommandCode.POSTCOPY_LISTEN))
        save_devices(live, package, end=None)
        still.devices_saved()
        package.write(ping(_PING_DEVICES))
        package.write(command(CommandCode.POSTCOPY_RUN))
        live.saver.complete_precopy(
            live.out, iterable_only=True, inactivate_disks=False, in_postcopy=True
        )
        _discard(live)
        live.ask_how_far(_PING_DISCARDED)
        check_still(live)
        # Once it has the package, the destination runs the guest.
        task.control.commit()
        still.handed_over()
        live.out.write(packaged(package.getvalue()))
        live.out.write(ping(_PING_PACKAGED))
        live.out.flush()
        live.note_downtime(still.downtime)
        faultpoints.reach("switched-over")
        counters.stage = "postcopy"
        task.control.enter("postcopy-active", "saving")
        _send_the_rest(live)
    counters.end()


def _discard(live: LiveTransfer) -> None:
    """Name all pages of which the destination has an old version or none."""
    for index, (idstr, _) in enumerate(live.task.handler.blocks):
        for record in ram_discard(idstr, list(live.ram.dirty.runs(index))):
            live.out.write(record)


def _send_the_rest(live: LiveTransfer) -> None:
    while live.ram.remaining_bytes:
        live.check()
        if live.link is not None:
            # Cleared before the requests are read: a later request sets it again.
            live.link.requested.clear()
        live.iterate(live.task.parameters.now.max_postcopy_bandwidth)
    # If RAM changed, the destination has a mix of old and new pages: better no guest than that one.
    check_still(live)
    live.saver.complete_postcopy(live.out)
    live.out.flush()
    live.wait_done()
    live.channel.commit()
