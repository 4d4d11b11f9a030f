"""Live migration: RAM in rounds while the guest runs, then the rest while it stands still.

Source: QEMU ``migration/migration.c``: migration_thread, migration_iteration_run,
migration_completion_precopy.
"""

from __future__ import annotations

from contextlib import ExitStack

from stillframe.migration.capabilities import POSTCOPY_RAM
from stillframe.migration.hand_over import hand_over
from stillframe.migration.live import LiveTransfer, check_still, save_devices
from stillframe.migration.outgoing import Outgoing
from stillframe.migration.outgoing_channel import OutgoingChannel
from stillframe.migration.output import Buffer
from stillframe.migration.postcopy import finish_in_postcopy
from stillframe.migration.standing import GuestStandsStill
from stillframe.migration.stream_commands import command, ping, postcopy_advise
from stillframe.migration.switchover import Switchover
from stillframe.snapshot import faultpoints
from stillframe.snapshot.arming import arm_capture
from stillframe.vmstate.wire import CommandCode

_PING_SETUP = 1
_PING_LOADED = 5
"""QEMU uses 1 to 4."""


def migrate_live(task: Outgoing, channel: OutgoingChannel, cleanup: ExitStack) -> None:
    """Bring the guest to the destination; it stands still here afterwards.

    Raises:
        StillframeError: it failed or was cancelled; the guest goes on here (after a switch-over
            to postcopy it stands still).
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
    task.enter("active", only_from=("setup",))
    task.control.enter("active", "saving")
    task.counters.begin_transfer()


def _finish(live: LiveTransfer) -> None:
    task, counters = live.task, live.counters
    with GuestStandsStill(live.board) as still:
        task.enter("device", only_from=("active",))
        counters.stage = "downtime"
        faultpoints.reach("stopped")
        live.ram.limit_batch(0)
        devices, end = Buffer(), Buffer()
        save_devices(live, devices, end=end)
        still.devices_saved()
        live.saver.complete_precopy(live.out, iterable_only=True, inactivate_disks=False)
        live.out.write(devices.content)
        live.ask_how_far(_PING_LOADED)
        check_still(live)
        faultpoints.reach("sent")
        # It has loaded everything, and starts the guest when it reads the end of the stream.
        task.commit()
        hand_over(live, still, end.content)
        live.note_downtime(still.downtime)
    counters.end()
