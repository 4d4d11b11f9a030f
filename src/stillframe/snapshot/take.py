"""The take of one snapshot, from the pre-flight to the complete file under its name.

On every path, everything that was set up is undone in reverse order (DESIGN section 2).
"""

from __future__ import annotations

import datetime
import os
from collections.abc import Callable, Sequence
from contextlib import ExitStack, closing

import msgspec

from stillframe.disks.point_in_time import Disks, disks_of
from stillframe.errors import HostError
from stillframe.machine import Machine
from stillframe.model import (
    TARGET_PAGE_BYTES,
    CapturedDisk,
    Downtime,
    GpaRange,
    MachineRecord,
    Manifest,
    ParentRecord,
    RamBlock,
    Statistics,
)
from stillframe.snapshot import faultpoints
from stillframe.snapshot.blockers import check_fit, check_saved, refuse
from stillframe.snapshot.early_reader import EarlyReader, NoReader
from stillframe.snapshot.guard import Guarding
from stillframe.snapshot.guest_state import guest_told
from stillframe.snapshot.hold import Hold
from stillframe.snapshot.instant import take_instant
from stillframe.snapshot.job import JobControl
from stillframe.snapshot.memory_limit import (
    first_to_be_killed,
    spill_within_limit,
)
from stillframe.snapshot.options import SnapshotOptions
from stillframe.snapshot.output import Output
from stillframe.snapshot.pause_watch import PauseWatch
from stillframe.snapshot.ram_blocks import check_instant
from stillframe.snapshot.saving import Saving
from stillframe.snapshot.stopped import hold_still
from stillframe.snapshot.stream_framing import StreamFraming, block_records
from stillframe.snapshot.taken import TakenSnapshot
from stillframe.still.host_mark import HostKey
from stillframe.still.sinks import Sink
from stillframe.still.writer import SnapshotWriter
from stillframe.version import __version__

_NO_READER = NoReader()


def take_snapshot(
    control: JobControl,
    machine: Machine,
    sink: Sink,
    options: SnapshotOptions,
    reader: EarlyReader = _NO_READER,
) -> TakenSnapshot:
    """Take a snapshot of ``machine`` into ``sink``; the sink is committed or aborted.

    Args:
        reader: as for :func:`take_into`.

    Raises:
        RefusedError: the pre-flight found that it would not be safe; nothing was touched.
        BusyError: another snapshot or migration of the VM is under way.
        SnapshotCancelled, SnapshotFailed, MachineError, SinkError, HostError: the guest
            runs, unprotected, and nothing was left behind; see ``guest_state``.
    """
    writer = SnapshotWriter(sink, key=options.key, increment=options.parent is not None)
    return take_into(control, machine, writer, options, reader)


def take_into(
    control: JobControl,
    machine: Machine,
    output: Output,
    options: SnapshotOptions,
    reader: EarlyReader = _NO_READER,
) -> TakenSnapshot:
    """As :func:`take_snapshot`, into any output, which is finished or aborted.

    Args:
        reader: uses pages before the end of the job. It may ask for pages only in mode
            ``background``.
    """
    with guest_told(machine), closing(Hold(machine)) as hold:
        return _take(control, hold, output, options, reader)


def take_held(
    control: JobControl, hold: Hold, output: Output, options: SnapshotOptions
) -> TakenSnapshot:
    """As :func:`take_into`, of a held machine: an increment on ``hold.last``, if there is one.

    A refusal, or a failure from the instant on, un-protects RAM and leaves the hold useless. Any
    other failure before the instant leaves everything as it was.

    Args:
        output: for an increment, if the snapshot is one.
        options: may have a parent only for the hold's first snapshot.
    """
    with guest_told(hold.machine):
        return _take(control, hold, output, options, _NO_READER)


def _take(
    control: JobControl,
    hold: Hold,
    output: Output,
    options: SnapshotOptions,
    reader: EarlyReader,
) -> TakenSnapshot:
    with ExitStack() as cleanup:
        if hold.machine.pid != os.getpid():
            cleanup.enter_context(first_to_be_killed())
        cleanup.callback(output.abort)
        control.progress.output = output
        cleanup.callback(control.progress.keep)
        return _Taking(control, hold, output, options, cleanup, reader).run()


def sees_our_files(pid: int) -> bool:
    """Return whether a process has our root directory, so that its paths are ours. The paths on a
    container's command line, for example, mean nothing here. Raises OSError if not permitted."""
    return os.path.samefile(f"/proc/{pid}/root", "/")  # noqa: PTH121


def mark_key(pid: int, notes: list[str]) -> HostKey | None:
    """Return the key that marks a VM's snapshot as taken on this host, if possible; else note
    why."""
    try:
        return HostKey.load_or_make() if sees_our_files(pid) else None
    except (HostError, OSError) as error:
        notes.append(f"it has no mark, so its restore will ask for trust: {error}")
        return None


class _Taking:
    """One job, step by step, with the state that the steps share."""

    def __init__(
        self,
        control: JobControl,
        hold: Hold,
        output: Output,
        options: SnapshotOptions,
        cleanup: ExitStack,
        reader: EarlyReader,
    ) -> None:
        self._control = control
        self._progress = control.progress
        self._hold = hold
        self._machine = hold.machine
        self._output = output
        self._options = options
        self._cleanup = cleanup
        self._reader = reader
        self._background = options.mode == "background"
        self._spill_bytes = options.spill_bytes
        self._notes: list[str] = []

    def run(self) -> TakenSnapshot:
        machine, hold = self._machine, self._hold
        self._control.enter("setup", "preflight")
        hold.lock()
        found = check_fit(hold, self._options)
        self._notes += found.notes
        hold.list_blocks()
        if machine.pid != os.getpid():
            if hold.look_at_swap():
                self._notes.append("a part of its RAM is in swap: it is read, and left there")
            self._spill_bytes = spill_within_limit(machine.pid, self._options.spill_bytes)
        blocks = hold.blocks
        self._progress.ram_bytes = sum(block.used_length_bytes for block in blocks)

        guard = hold.guard()
        disks = self._prepare_disks(guard)
        self._cleanup.callback(machine.finish_device_state)
        if not self._options.for_analysis:  # saving can kill a VM with an unsavable device
            machine.prepare_device_state()
        # Before the guest is slowed down, and after all other slow steps.
        self._cleanup.callback(self._reader.undo)
        self._reader.prepare(
            lambda: msgspec.structs.replace(
                self._manifest(blocks, hold.memory_map, machine.describe()),
                captured_disks=disks.planned,
            )
        )
        ram = hold.arm(self._control, self._options, self._spill_bytes, may_drop=found.may_drop)
        watch = hold.watch()
        record = machine.describe()
        self._notes += record.differences
        self._control.check_cancelled()
        ram.check()
        refuse(machine.preflight(self._options.mode, "stop"), hold, self._options)
        disks.before_stop()

        # Query the run state only now: attaching and arming take time, and other clients may change
        # it. Watch from before the query, so that a resume after the answer is seen.
        self._control.enter("active", self._progress.phase)
        pause_watch = PauseWatch(watch)
        run_state = machine.status()
        with_devices = not self._options.for_analysis
        parent = hold.begin_instant()
        parent_record = None if parent is None else ParentRecord(id=parent.id, path=parent.file)
        if self._options.parent is not None:
            parent_record = self._options.parent.record
        if self._background:
            self._cleanup.callback(hold.give_up)
            instant = take_instant(
                machine,
                guard,
                ram,
                pause_watch,
                run_state=run_state,
                with_devices=with_devices,
                disks=disks,
            )
            self._note_downtime(instant.downtime)
            free_guest: Callable[[], object] = hold.give_up
        else:
            instant, resume = hold_still(
                machine,
                guard,
                pause_watch,
                run_state=run_state,
                with_devices=with_devices,
                disks=disks,
            )
            free_guest = resume
            self._cleanup.callback(resume)
            # Only after the stop: pages that were touched before it belong to the instant.
            ram.learn_population()
        self._progress.writes_while_stopped = instant.writes

        def after_instant() -> None:
            if self._background:
                disks.thaw()
            disks.after_instant()
            faultpoints.reach("continued")
            hold.check_tracking(parent)
            check_instant(hold.signature, machine.blocks_signature())
            # Our own overlays change the media, too, and would hide or fake a change.
            if not disks.planned and machine.describe().command_line != record.command_line:
                self._notes.append("devices or media changed at about the instant: check them")

        parts = StreamFraming(
            blocks,
            instant.device_state,
            machine_type=record.machine_type,
            run_state=run_state,
            argv=record.argv,
        )
        saving = Saving(
            self._control, hold, self._output, self._options, self._reader, self._cleanup
        )
        saving.run(ram, parts, free_guest=free_guest, after_instant=after_instant)
        self._notes += check_saved(hold, self._options, watch)
        if not self._background:
            pause_watch.check(also=("RESET",))
            self._note_downtime(resume())
            disks.thaw()  # needs a running guest

        captured = self._finish_disks(disks)
        if disks.quiesced:
            self._notes.append(
                "the guest's file systems are frozen in it: restore and fork have its agent thaw"
                " them, any other loader has to ask for that (guest-fsfreeze-thaw)"
            )
        key = mark_key(self._machine.pid, self._notes)
        manifest = msgspec.structs.replace(
            self._manifest(blocks, hold.memory_map, record),
            stream_bytes=self._output.stream_bytes,
            statistics=self._final_statistics(),
            notes=tuple(self._notes),
            captured_disks=captured,
            without_disks=disks.without,
            quiesced=disks.quiesced,
            parent=parent_record,
            page_origins=saving.origins.encode(),
        )
        faultpoints.reach("manifest")
        self._control.enter("active", "syncing")
        self._control.commit()
        snapshot_id = self._output.finish(manifest, key=key)
        disks.keep()
        self._reader.keep()
        self._progress.keep()
        taken = TakenSnapshot(
            id=snapshot_id,
            file=self._output.description,
            statistics=self._final_statistics("completed"),
            notes=tuple(self._notes),
        )
        hold.complete(taken)
        return taken

    def _manifest(
        self, blocks: Sequence[RamBlock], memory_map: tuple[GpaRange, ...], record: MachineRecord
    ) -> Manifest:
        return Manifest(
            created=datetime.datetime.now(datetime.UTC).isoformat(timespec="milliseconds"),
            mode=self._options.mode,
            stillframe_version=__version__,
            target_page_bytes=TARGET_PAGE_BYTES,
            stream_bytes=0,
            blocks=block_records(blocks),
            memory_map=memory_map,
            machine=record,
            for_analysis=self._options.for_analysis,
        )

    def _prepare_disks(self, guard: Guarding) -> Disks:
        self._control.enter("setup", "preparing disks")
        disks = disks_of(self._machine, self._options.disks, guard)
        self._cleanup.callback(disks.undo)
        disks.prepare()
        self._progress.disks = disks.words
        if disks.words and self._options.disks.kind != "none":
            self._notes.append(f"disks: {disks.words}")
        return disks

    def _finish_disks(self, disks: Disks) -> tuple[CapturedDisk, ...]:
        """Wait for the disk copies while the guest runs."""
        self._control.enter("active", "copying disks")

        def step(done: int, total: int) -> None:
            self._control.check_cancelled()
            if total:
                self._progress.disk_done_bytes, self._progress.disk_bytes = done, total
            self._control.tell()

        captured = disks.finish(step)
        faultpoints.reach("copied")
        return captured

    def _note_downtime(self, downtime: Downtime) -> None:
        self._progress.downtime = downtime
        self._progress.downtime_ms = downtime.total_ms

    def _final_statistics(self, phase: str = "") -> Statistics:
        return msgspec.structs.replace(self._progress.statistics(), state="completed", phase=phase)
