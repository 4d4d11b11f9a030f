"""The background snapshot of the board: QEMU's order, with RAM protected before the devices are
saved, so that what they write is seen (DESIGN section 3, invariant 8).

Source: QEMU ``migration/migration.c``: bg_migration_thread.
"""

from __future__ import annotations

from contextlib import ExitStack

from stillframe.errors import SnapshotFailed
from stillframe.machine.board.inside import InsideMachine
from stillframe.memory.ram_capture import RamCapture
from stillframe.migration.outgoing import Outgoing
from stillframe.migration.outgoing_channel import OutgoingChannel
from stillframe.migration.output import GatheredOutput
from stillframe.migration.ram_handler import CapturedRam
from stillframe.snapshot import faultpoints
from stillframe.snapshot.arming import arm_capture, open_capture
from stillframe.snapshot.bandwidth import BandwidthLimit
from stillframe.snapshot.guard import NoGuard
from stillframe.snapshot.instant import Instant, take_instant
from stillframe.snapshot.options import DEFAULT_SPILL_BYTES
from stillframe.snapshot.standstill import Standstill


def save_in_background(task: Outgoing, channel: OutgoingChannel, cleanup: ExitStack) -> None:
    """Write the machine as it is at one instant, while it goes on.

    Raises:
        StillframeError: it failed or was cancelled; the guest goes on, unprotected.
    """
    machine = InsideMachine(task.board, protection=task.protection)
    cleanup.callback(machine.close)
    saver = task.board.saver
    blocks = tuple(machine.ram_blocks())
    signature = machine.blocks_signature()
    task.handler.blocks = [(block.idstr, block.used_length_bytes) for block in blocks]
    out = GatheredOutput(channel, task.counters)

    task.control.enter("setup", "attaching")
    capture = open_capture(
        task.control,
        cleanup,
        machine.open_userfaultfd(),
        machine.pid,
        blocks,
        spill_bytes=DEFAULT_SPILL_BYTES,
    )
    saver.header(out)
    saver.setup(out)
    out.flush()
    task.enter("active", only_from=("setup",))
    task.counters.begin_transfer()
    cleanup.callback(machine.finish_device_state)
    machine.prepare_device_state()
    arm_capture(task.control, cleanup, capture)

    instant = _fix(task, machine, capture)
    faultpoints.reach("continued")

    task.control.enter("active", "saving")
    task.handler.sender = CapturedRam(capture, task.counters)
    _save_ram(task, capture, out)
    capture.finish()
    faultpoints.reach("unprotected")
    # What faulted last is in a partly filled slab, which finish has handed on.
    _save_ram(task, capture, out)
    capture.check()
    if machine.blocks_signature() != signature:
        raise SnapshotFailed("the RAM blocks changed while they were saved", guest_state="running")

    out.write(instant.device_state)
    out.flush()
    task.commit()
    channel.commit()
    task.counters.end()


def _fix(task: Outgoing, machine: InsideMachine, capture: RamCapture) -> Instant:
    watch = machine.watch()
    try:
        standstill = Standstill(watch)
        # No guard: the machine dies with us.
        instant = take_instant(machine, NoGuard(), capture, standstill, run_state=machine.status())
    finally:
        watch.close()
    progress = task.control.progress
    progress.downtime = instant.downtime
    progress.downtime_ms = task.counters.downtime_ms = instant.downtime.total_ms
    progress.writes_while_stopped = instant.writes
    return instant


def _save_ram(task: Outgoing, capture: RamCapture, out: GatheredOutput) -> None:
    """Until nothing of RAM is left now."""
    counters = task.counters
    # QEMU does not limit a background snapshot; a limit that somebody chose is another matter.
    limit = BandwidthLimit(None)
    through = False
    while not through:
        task.control.check_cancelled()
        capture.check()
        before = counters.transferred_bytes
        through = task.board.saver.iterate(out)
        out.flush()
        counters.measure()
        if task.parameters.chosen("max-bandwidth"):
            limit.bytes_per_s = task.parameters.now.max_bandwidth or None
        limit.wait(counters.transferred_bytes - before, task.control.cancelled)
    faultpoints.reach("swept")
