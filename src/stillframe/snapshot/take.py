"""Takes one snapshot: from the pre-flight to the file under its name.

Everything that is set up is undone in reverse order, on every path (DESIGN section 2).
"""

from __future__ import annotations

import datetime
from collections.abc import Callable
from contextlib import ExitStack

import msgspec

from stillframe.errors import (
    GuestState,
    MachineError,
    RefusedError,
    SnapshotFailed,
    StillframeError,
)
from stillframe.machine import Machine, Watch
from stillframe.memory.ram_capture import RamCapture
from stillframe.model import Downtime, Manifest, RamBlock, Statistics
from stillframe.snapshot import faultpoints
from stillframe.snapshot.adaptive_level import AdaptiveLevel
from stillframe.snapshot.arming import arm_capture, open_capture
from stillframe.snapshot.bandwidth import BandwidthLimit
from stillframe.snapshot.encoders import Encoders, worker_count
from stillframe.snapshot.exclusive import VmLock
from stillframe.snapshot.guard import guard_of
from stillframe.snapshot.instant import take_instant
from stillframe.snapshot.job import JobControl
from stillframe.snapshot.options import SnapshotOptions
from stillframe.snapshot.standstill import Standstill
from stillframe.snapshot.stopped import hold_still
from stillframe.snapshot.stream_parts import TARGET_PAGE_BYTES, StreamParts, block_records
from stillframe.snapshot.yielding import VcpuDelay
from stillframe.store.backends import Sink
from stillframe.store.frames import LEVEL_NONE
from stillframe.store.writer import SnapshotWriter
from stillframe.version import __version__

_TICK_S = 0.1


class TakenSnapshot(msgspec.Struct, frozen=True, kw_only=True):
    """A finished snapshot: its id (BLAKE3, hex), its file, the job's numbers, and notes."""

    id: str
    file: str
    statistics: Statistics
    notes: tuple[str, ...] = ()


def take_snapshot(
    control: JobControl, machine: Machine, sink: Sink, options: SnapshotOptions
) -> TakenSnapshot:
    """Take a snapshot of ``machine`` into ``sink``; the sink is committed or aborted.

    Raises:
        RefusedError: the pre-flight found why it would not be safe; nothing was touched.
        BusyError: another snapshot or migration of the VM is under way.
        SnapshotCancelled, SnapshotFailed, MachineError, SinkError, HostError: the guest
            runs, unprotected, and nothing was left behind; see ``guest_state``.
    """
    try:
        with ExitStack() as cleanup:
            writer = cleanup.enter_context(SnapshotWriter(sink))
            control.progress.writer = writer
            cleanup.callback(control.progress.keep)
            return _Taking(control, machine, sink, options, writer, cleanup).run()
    except StillframeError as error:
        error.guest_state = _guest_state(machine, error.guest_state)
        raise


def _guest_state(machine: Machine, supposed: GuestState) -> GuestState:
    """What the guest does now, after all cleanup, as the machine itself says."""
    if not machine.process_alive():
        return "none"
    try:
        return "running" if machine.status() == "running" else "paused"
    except StillframeError:
        return supposed


class _Taking:
    """The steps of one job; the state that they share."""

    def __init__(
        self,
        control: JobControl,
        machine: Machine,
        sink: Sink,
        options: SnapshotOptions,
        writer: SnapshotWriter,
        cleanup: ExitStack,
    ) -> None:
        self._control = control
        self._progress = control.progress
        self._machine = machine
        self._sink = sink
        self._options = options
        self._writer = writer
        self._cleanup = cleanup
        self._background = options.mode == "background"
        self._notes: list[str] = []

    def run(self) -> TakenSnapshot:
        machine = self._machine
        self._control.enter("setup", "preflight")
        self._cleanup.enter_context(VmLock(machine.pid, machine.start_time))
        faultpoints.reach("locked")
        self._preflight()
        record = machine.describe()
        blocks = tuple(machine.ram_blocks())
        memory_map = machine.memory_map(blocks)
        signature = machine.blocks_signature()
        self._progress.ram_bytes = sum(block.used_length_bytes for block in blocks)

        guard = guard_of(machine.monitor_fd())
        self._cleanup.callback(guard.close)
        faultpoints.reach("guarded")
        self._cleanup.callback(machine.finish_device_state)
        machine.prepare_device_state()
        ram = self._attach(blocks)
        watch = machine.watch()
        self._cleanup.callback(watch.close)
        self._control.check_cancelled()
        ram.check()
        machine.refuse_unsavable()

        # Asked now and not earlier: attaching and arming take time, and others use the VM too.
        # Watched from before the question: a resume after the answer must not go unseen.
        standstill = Standstill(watch)
        run_state = machine.status()
        if self._background:
            instant = take_instant(machine, guard, ram, standstill, run_state=run_state)
            self._note_downtime(instant.downtime)
            free_guest: Callable[[], object] = ram.release
        else:
            instant, resume = hold_still(machine, guard, standstill, run_state=run_state)
            free_guest = resume
            self._cleanup.callback(resume)
            # Only now: a page that was touched before the stop is a part of the instant.
            ram.learn_population()
        faultpoints.reach("continued")
        self._progress.writes_while_stopped = instant.writes

        parts = StreamParts(
            blocks,
            instant.device_state,
            machine_type=record.machine_type,
            run_state=run_state,
        )
        self._save(ram, parts, free_guest)
        self._check_unchanged(signature, watch)
        if not self._background:
            standstill.check(also=("RESET",))
            self._note_downtime(resume())

        manifest = Manifest(
            created=datetime.datetime.now(datetime.UTC).isoformat(timespec="milliseconds"),
            mode=self._options.mode,
            stillframe_version=__version__,
            target_page_bytes=TARGET_PAGE_BYTES,
            stream_bytes=self._writer.stream_bytes,
            blocks=block_records(blocks),
            memory_map=memory_map,
            machine=record,
            statistics=self._final_statistics(),
            notes=tuple(self._notes),
        )
        faultpoints.reach("manifest")
        self._control.enter("active", "syncing")
        snapshot_id = self._writer.finish(manifest)
        self._progress.keep()
        self._progress.begin("completed", "completed")
        return TakenSnapshot(
            id=snapshot_id,
            file=self._sink.description,
            statistics=self._progress.statistics(),
            notes=tuple(self._notes),
        )

    def _preflight(self) -> None:
        hindrances = self._machine.preflight(self._options.mode)
        refusals = tuple(h for h in hindrances if h.severity == "refuse")
        self._notes += [f"{h.name}: {h.reason}" for h in hindrances if h.severity == "warn"]
        if refusals:
            first = refusals[0]
            more = f" (and {len(refusals) - 1} more)" if len(refusals) > 1 else ""
            raise RefusedError(
                f"{first.name}{more}",
                why=first.reason,
                remedy=first.remedy,
                guest_state="running" if self._machine.status() == "running" else "paused",
                reasons=tuple((h.name, h.reason, h.remedy) for h in refusals),
            )

    def _attach(self, blocks: tuple[RamBlock, ...]) -> RamCapture:
        self._control.enter("setup", "attaching")
        ram = open_capture(
            self._control,
            self._cleanup,
            self._machine.open_userfaultfd() if self._background else None,
            self._machine.pid,
            blocks,
            spill_bytes=self._options.spill_bytes,
        )
        if self._background:
            arm_capture(self._control, self._cleanup, ram, arm=self._options.arm)
        return ram

    def _note_downtime(self, downtime: Downtime) -> None:
        self._progress.downtime = downtime
        self._progress.downtime_ms = downtime.total_ms

    def _save(self, ram: RamCapture, parts: StreamParts, free_guest: Callable[[], object]) -> None:
        control = self._control
        control.enter("active", "saving")
        self._writer.append_stream(parts.head())
        delay = VcpuDelay(self._machine.pid)
        self._cleanup.callback(delay.close)
        encoders = Encoders(
            ram,
            self._writer,
            section_id=parts.section_id,
            workers=worker_count(self._options.workers),
            limit=BandwidthLimit(self._options.max_bandwidth_bytes_per_s),
            delay=delay,
            level=self._level(),
        )
        self._cleanup.callback(encoders.stop)
        # Undone before that: an encoder may hang in a blocked sink, and the guest must not wait.
        self._cleanup.callback(free_guest)
        encoders.start()
        while not encoders.idle.wait(_TICK_S):
            control.check_cancelled()
            ram.check()
            if not self._machine.process_alive():
                raise MachineError("the VM exited while its RAM was saved", guest_state="none")
            control.tell()
        encoders.check()
        control.check_cancelled()
        faultpoints.reach("swept")
        if self._background:
            ram.finish()
            faultpoints.reach("unprotected")
            encoders.drain()
        ram.check()
        self._writer.append_stream(parts.tail())
        self._check_complete(ram)

    def _level(self) -> AdaptiveLevel:
        wanted = self._options.compression_level
        if wanted == "adaptive":
            return AdaptiveLevel(None)
        return AdaptiveLevel(LEVEL_NONE if wanted is None else wanted)

    def _check_complete(self, ram: RamCapture) -> None:
        done_bytes = int(ram.statistics()["pages_done"]) * TARGET_PAGE_BYTES
        if done_bytes < self._progress.ram_bytes:
            raise SnapshotFailed(
                "the snapshot is incomplete",
                why=f"{done_bytes} of {self._progress.ram_bytes} bytes of RAM were saved",
                guest_state="running",
            )

    def _check_unchanged(self, signature: object, watch: Watch) -> None:
        """Blocks that appeared, vanished or were resized make the snapshot wrong; the rest of
        what happened is noted."""
        if self._machine.blocks_signature() != signature:
            raise SnapshotFailed(
                "the VM's RAM blocks changed while they were saved",
                why="hotplug, or a reset that resized one",
                remedy="take another snapshot once it has settled",
                guest_state="running",
            )
        self._notes += [
            f"{event.name} came while RAM was saved"
            for event in watch.seen()
            if event.name not in ("STOP", "RESUME")
        ]

    def _final_statistics(self) -> Statistics:
        return msgspec.structs.replace(self._progress.statistics(), state="completed", phase="")
