"""Live migration: RAM in rounds while the guest runs, then the rest while it is stopped.

Source: QEMU ``migration/migration.c``: migration_thread, migration_iteration_run,
migration_update_counters, migration_completion_precopy. Other than there, all pages were sent once
before the guest is stopped, and nothing is on its way then.
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
    """When the guest may be stopped: what is left can be sent within the downtime limit."""

    def __init__(self, live: LiveTransfer) -> None:
        self._live = live
        self._through = False

    def is_near(self) -> bool:
        """Whether little is left of what was known to be dirty at the last look."""
        left_bytes = self._live.ram.remaining_bytes
        self._through = self._through or left_bytes == 0
        return left_bytes <= self._most_bytes()

    def is_due(self) -> bool:
        """Whether little is left, also of what the guest has written since; if not, it begins
        another round.

        Raises:
            SinkError, DataError: the destination failed. SnapshotCancelled: it was cancelled.
        """
        self._live.drain()
        self._live.ram.sync()
        return self._live.ram.remaining_bytes <= self._most_bytes()

    def _most_bytes(self) -> float:
        """What can be sent while the guest is stopped."""
        if not self._through:
            return 0.0
        parameters = self._live.task.parameters.now
        speed = parameters.avail_switchover_bandwidth or dependable_bytes_per_s(self._live.meter)
        return speed * parameters.downtime_limit / 1e3


def migrate_live(task: Outgoing, channel: OutgoingChannel, cleanup: ExitStack) -> None:
    """Bring the guest to the destination; it is stopped here afterwards.

    Raises:
        StillframeError: it failed or was cancelled; the guest goes on here (after a switch-over
            to postcopy it is stopped).
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
        # It has loaded everything, and starts the guest when it reads the end of the stream.
        task.control.commit()
        _hand_over(live, still, end.getvalue())
        live.note_downtime(still.downtime)
    counters.end()


def _hand_over(live: LiveTransfer, still: StoppedGuest, end: bytes) -> None:
    """Send the stream's end, with which the destination starts the guest, and wait for its word.

    The guest never runs in two places: a source that cannot know whether it runs there stands
    still.

    Raises:
        StillframeError: the guest does not run at the destination, and goes on here: the end could
            not be sent at all, a file could not be written, or the destination has said that it
            could not load.
        SinkError: nobody knows whether it runs there; it stays as it is here.
    """
    if live.link is not None:
        live.link.check()
    # One byte goes out or does not; without it nobody starts the guest.
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
