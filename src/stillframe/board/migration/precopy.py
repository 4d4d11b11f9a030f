"""Precopy: sends RAM in rounds while the guest runs, then the rest while it is stopped.

Source: QEMU ``migration/migration.c``: migration_thread, migration_iteration_run,
migration_update_counters, migration_completion_precopy. Unlike QEMU, this stops the guest only
after every page was sent once and nothing is in flight.
"""

from __future__ import annotations

import io
from contextlib import ExitStack

from stillframe.board.migration.capabilities import POSTCOPY_RAM
from stillframe.board.migration.live import (
    LiveTransfer,
    StoppedGuest,
    check_still,
    dependable_bytes_per_s,
    save_devices,
)
from stillframe.board.migration.outgoing import Outgoing
from stillframe.board.migration.outgoing_channel import OutgoingChannel
from stillframe.board.migration.postcopy import finish_in_postcopy
from stillframe.board.migration.stream_commands import command, ping, postcopy_advise
from stillframe.errors import SinkError, StillframeError
from stillframe.snapshot import faultpoints
from stillframe.snapshot.arming import arm_capture
from stillframe.vmstate.wire import CommandCode

_PING_SETUP = 1
_PING_LOADED = 5
"""QEMU uses 1 to 4."""


class Switchover:
    """The decision when to stop the guest: when the rest can be sent within the downtime limit."""

    def __init__(self, live: LiveTransfer) -> None:
        self._live = live
        self._through = False

    def is_near(self) -> bool:
        """Return whether what was dirty at the last sync fits into the downtime limit."""
        left_bytes = self._live.ram.remaining_bytes
        self._through = self._through or left_bytes == 0
        return left_bytes <= self._most_bytes()

    def is_due(self) -> bool:
        """Sync, and return whether all that is dirty now fits too; if not, a new round has begun.

        Raises:
            SinkError, DataError: the destination failed. SnapshotCancelled: it was cancelled.
        """
        self._live.drain()
        self._live.ram.sync()
        return self._live.ram.remaining_bytes <= self._most_bytes()

    def _most_bytes(self) -> float:
        """Return how much can be sent within the downtime limit; 0 before all was sent once."""
        if not self._through:
            return 0.0
        parameters = self._live.task.parameters.now
        speed = parameters.avail_switchover_bandwidth or dependable_bytes_per_s(self._live.meter)
        return speed * parameters.downtime_limit / 1e3


def migrate_live(task: Outgoing, channel: OutgoingChannel, cleanup: ExitStack) -> None:
    """Migrate the guest to the destination; here it is stopped afterwards.

    Raises:
        StillframeError: the migration failed or was cancelled; the guest goes on here, or stays
            stopped if it may run at the destination (always after a switch-over to postcopy).
    """
    live = LiveTransfer(task, channel, cleanup)
    _set_up(live, cleanup)
    parameters = task.parameters
    switchover = Switchover(live)
    while True:
        live.check()
        wanted = task.postcopy_wanted.is_set() and task.capabilities[POSTCOPY_RAM]
        if wanted and live.heard():
            finish_in_postcopy(live)
            return
        if switchover.is_near() and live.heard() and switchover.is_due():
            _finish(live)
            return
        live.iterate(parameters.now.max_bandwidth)
        faultpoints.reach("first-batch")


def _set_up(live: LiveTransfer, cleanup: ExitStack) -> None:
    task, out, saver = live.task, live.out, live.saver
    saver.header(out)
    if live.link is not None:
        out.write(command(CommandCode.OPEN_RETURN_PATH))
        out.write(ping(_PING_SETUP))
    if task.capabilities[POSTCOPY_RAM]:
        out.write(postcopy_advise())
    saver.setup(out)
    out.flush()
    live.expect_answer()
    arm_capture(task.control, cleanup, live.capture)
    live.ram.begin()
    task.control.enter("active", "saving")


def _finish(live: LiveTransfer) -> None:
    task, counters = live.task, live.counters
    with StoppedGuest(live.board) as still:
        task.control.enter("device", "stopped")
        counters.stage = "downtime"
        faultpoints.reach("stopped")
        live.ram.limit_batch(0)
        devices, end = io.BytesIO(), io.BytesIO()
        save_devices(live, devices, end=end)
        still.devices_saved()
        live.saver.complete_precopy(live.out, iterable_only=True, inactivate_disks=False)
        live.out.write(devices.getvalue())
        live.ask_how_far(_PING_LOADED)
        check_still(live)
        faultpoints.reach("sent")
        # The destination has loaded everything and starts the guest when it reads the stream's end.
        task.control.commit()
        _hand_over(live, still, end.getvalue())
        live.note_downtime(still.downtime)
    counters.end()


def _hand_over(live: LiveTransfer, still: StoppedGuest, end: bytes) -> None:
    """Send the stream's end, on which the destination starts the guest, and wait for its answer.

    The guest never runs in two places: if the source cannot know whether the guest runs at the
    destination, the guest stays stopped here.

    Raises:
        StillframeError: the guest does not run at the destination and goes on here: no byte of the
            end was sent, a file could not be written, or the destination reported a failed load.
        SinkError: the guest may run at the destination; it stays stopped here.
    """
    if live.link is not None:
        live.link.check()
    # A single byte is either sent or not; without it the destination does not start the guest.
    live.out.write(end[:1])
    live.out.flush()
    try:
        live.out.write(end[1:])
        live.out.flush()
        live.wait_done()
        live.channel.commit()
    except BaseException as error:
        if live.channel.stores or (live.link is not None and live.link.refused):
            raise
        still.handed_over()
        if not isinstance(error, StillframeError):
            raise
        raise SinkError(
            "the guest may run at the destination, so it stays stopped here",
            why=str(error),
            remedy="find out whether it runs there; only if it does not, let it go on here (cont)",
            guest_state="paused",
        ) from error
