"""Snapshots of a QEMU that has only a human monitor (HMP): QEMU migrates the VM into a pipe, and
this module turns the stream into a snapshot file.

``background`` uses QEMU's own background snapshot (capability ``background-snapshot``): QEMU stops
the guest, write-protects RAM and serves the faults. ``stop`` is an ordinary migration of the
stopped VM. On every path the pipe is read to its end, or closed with the VM stopped, before the VM
is put back; if this process dies, a guard does that (``machine/qemu/human_guard.py``).
Source: QEMU ``migration/migration.c``: bg_migration_thread.
"""

from __future__ import annotations

import os
import re
import select
import time
from collections.abc import Sequence
from contextlib import ExitStack

import msgspec

from stillframe.errors import (
    MachineError,
    RefusedError,
    StillframeError,
    UsageError,
    host_error,
)
from stillframe.machine.finding import find_human
from stillframe.machine.qemu import human_guard
from stillframe.machine.qemu.human_monitor import HumanMonitor
from stillframe.model import JobState, Manifest, Statistics
from stillframe.qmp.connection import QMP_OPTION
from stillframe.snapshot import faultpoints
from stillframe.snapshot.blockers import raise_first
from stillframe.snapshot.exclusive import VmLock
from stillframe.snapshot.guard import Guard
from stillframe.snapshot.job import JobControl
from stillframe.snapshot.memory_limit import check_room_for_swap
from stillframe.snapshot.options import SnapshotOptions
from stillframe.snapshot.take import mark_key
from stillframe.snapshot.taken import TakenSnapshot
from stillframe.still.frames import LEVEL_DEFAULT, LEVEL_NONE
from stillframe.still.import_stream import Imported, import_into, import_writer
from stillframe.still.sinks import Sink
from stillframe.store.store import Store
from stillframe.version import __version__

_WAIT_S = 0.1
# The second alternative of each is the output of QEMU 10.1 and later.
_DOWNTIME = re.compile(r"^downtime: (\d+) ms$|^Time \(ms\):.*\bdown=(\d+)", re.MULTILINE)
_STATUS = re.compile(r"^Migration status: ([\w-]+)|^Status:\s+([\w-]+)", re.MULTILINE)
_WHY = re.compile(r"^Error: (.*)$|^Status:\s+failed \((.*)\)$", re.MULTILINE)
_DISK = re.compile(r"^(\S+?)(?: \(#block\d+\))?: \S.* \((?!.*read-only)[^()]+\)$", re.MULTILINE)
_WAY = {
    "background": "its human monitor had QEMU make its own background snapshot",
    "stop": "its human monitor had QEMU migrate it while it was stopped",
}


def human_monitor(ref: str) -> HumanMonitor | None:
    """Connect to the VM that ``ref`` names if it has only a human monitor; else return None.

    Raises:
        BusyError, MachineError: the monitor does not answer.
    """
    found = find_human(ref)
    return None if found is None else HumanMonitor(*found)


def take_human_into_store(
    control: JobControl,
    monitor: HumanMonitor,
    store: Store,
    options: SnapshotOptions,
    tags: Sequence[str],
) -> TakenSnapshot:
    """As :func:`take_by_migration`, into a store; the snapshot is never an increment."""
    with store.target() as target:
        own = msgspec.structs.replace(options, key=store.key)
        taken = take_by_migration(control, monitor, target.sink, own)
        made = target.commit()
        store.tag(made, tags)
    return msgspec.structs.replace(taken, id=made.id)


def take_by_migration(
    control: JobControl, monitor: HumanMonitor, sink: Sink, options: SnapshotOptions
) -> TakenSnapshot:
    """Have QEMU save the VM, and write the snapshot; the sink is committed or aborted.

    On every path the guest runs afterwards, and QEMU's capabilities are as before.

    Raises:
        UsageError: an option needs QMP. RefusedError: QEMU refuses, or it would not be safe.
        BusyError: another snapshot of the VM is under way.
        SnapshotCancelled, MachineError, SinkError, HostError: see ``guest_state``.
    """
    _check_options(options)
    try:
        with ExitStack() as cleanup:
            cleanup.callback(sink.abort)
            return _Migration(control, monitor, options, cleanup).run(sink)
    except StillframeError as error:
        if not monitor.process_alive():
            error.guest_state = "none"
        elif error.guest_state != "unknown":
            error.guest_state = "running" if monitor.status() == "running" else "paused"
        raise


def _check_options(options: SnapshotOptions) -> None:
    asked = {
        "--for-analysis": options.for_analysis,
        "--max-bandwidth": options.max_bandwidth_bytes_per_s is not None,
        "--disks overlay": options.disks.kind == "overlay",
        "--quiesce": options.disks.quiesce,
    }
    for option, given in asked.items():
        if given:
            raise UsageError(
                f"{option} needs a QMP monitor, and the VM has one for people only",
                remedy=f"leave {option} out, or start the VM with {QMP_OPTION}",
                guest_state="running",
            )


class _Migration:
    """One job, step by step."""

    def __init__(
        self,
        control: JobControl,
        monitor: HumanMonitor,
        options: SnapshotOptions,
        cleanup: ExitStack,
    ) -> None:
        self._control = control
        self._monitor = monitor
        self._options = options
        self._cleanup = cleanup
        self._background = options.mode == "background"
        self._stream = -1
        self._stopped_s = 0.0
        self._notes: list[str] = []
        self._guard: Guard | None = None

    def run(self, sink: Sink) -> TakenSnapshot:
        control, monitor = self._control, self._monitor
        control.enter("setup", "preflight")
        self._cleanup.callback(VmLock(monitor.lock_name).close)
        raise_first(monitor.blockers(self._options.mode))
        check_room_for_swap(monitor.info.pid)  # QEMU reads all of RAM
        key = mark_key(monitor.info.pid, self._notes)
        try:
            self._stream, end = os.pipe()
        except OSError as error:
            raise host_error("cannot make a pipe for the VM's stream", error) from error
        self._cleanup.callback(self._close_stream)
        try:
            self._begin(end)
        finally:
            os.close(end)
        control.enter("active", "saving")
        level = self._options.compression_level
        with import_writer(
            sink,
            level=LEVEL_DEFAULT if level == "adaptive" else LEVEL_NONE if level is None else level,
            key=self._options.key,
        ) as writer:
            control.progress.output = writer
            manifest, imported = import_into(
                writer, self, stillframe_version=__version__, run_state="running"
            )
            manifest = self._complete(manifest, imported)
            control.commit()
            snapshot_id = writer.finish(manifest, key=key)
        control.progress.keep()
        return TakenSnapshot(
            id=snapshot_id,
            file=sink.description,
            statistics=self._statistics("completed"),
            notes=tuple(self._notes),
        )

    def _begin(self, end: int) -> None:
        """Make QEMU write to the pipe; from here on, every path puts the VM back."""
        monitor, mode = self._monitor, self._options.mode
        self._guard = Guard(
            monitor.socket.fileno(),
            human_guard.__file__,
            (str(self._stream), mode),
            (self._stream,),
        )
        self._cleanup.callback(self._guard.close)
        faultpoints.reach("guarded")
        self._expect(monitor.say(f"getfd {human_guard.FD}", end), "the pipe cannot be handed over")
        self._guard.arm()
        self._cleanup.callback(self._put_back)
        if self._background:
            refused = monitor.say(f"migrate_set_capability {human_guard.CAPABILITY} on")
            self._expect(refused, "QEMU takes no background snapshot of this VM")
        else:
            self._stopped_s = time.monotonic()
            self._expect(monitor.say("stop"), "the VM does not stop")
        faultpoints.reach("handed-over")
        self._expect(monitor.say(f"migrate -d fd:{human_guard.FD}"), "QEMU does not save this VM")
        faultpoints.reach("migrating")

    def _expect(self, answer: str, what: str) -> None:
        if answer:
            why = answer.removeprefix("Error: ")
            helps = self._background and "background" in what
            remedy = "use --mode stop: the guest stands still while all of it is saved"
            raise RefusedError(what, why=why, remedy=remedy if helps else None)

    def read(self, size: int, /) -> bytes:
        """Read the next bytes of QEMU's stream. Raises SnapshotCancelled."""
        waiting = select.poll()  # select(2) takes no descriptor above 1023
        waiting.register(self._stream, select.POLLIN)
        while not waiting.poll(_WAIT_S * 1000):
            self._control.check_cancelled()
            self._control.tell()
        self._control.check_cancelled()
        return os.read(self._stream, min(size, 1 << 20))

    def _put_back(self) -> None:
        """Let the guest run, unprotected, and release the guard."""
        if self._guard is None or not self._monitor.process_alive():
            return
        stream, self._stream = self._stream, -1
        self._monitor.go_on(stream, self._options.mode)
        self._guard.disarm()
        self._guard = None

    def _close_stream(self) -> None:
        if self._stream >= 0:
            os.close(self._stream)
            self._stream = -1

    def _complete(self, manifest: Manifest, imported: Imported) -> Manifest:
        """QEMU has written everything: put the VM back, and describe it in the manifest."""
        monitor, progress = self._monitor, self._control.progress
        human_guard.drain(self._stream)  # only the end of the stream is left
        faultpoints.reach("saved")
        self._control.enter("active", "syncing")
        told = self._ended()
        self._put_back()
        stopped_ms = (time.monotonic() - self._stopped_s) * 1e3
        if self._background:
            found = _DOWNTIME.search(told)
            stopped_ms = float(found[1] or found[2]) if found else 0.0
        progress.downtime_ms = stopped_ms
        progress.ram_bytes = sum(block.used_length_bytes for block in manifest.blocks)
        progress.saved_elsewhere(imported.data_pages, imported.zero_pages)
        record = monitor.record(imported.machine_type)
        disks = tuple(_DISK.findall(monitor.say("info block")))
        self._notes += [_WAY[self._options.mode], *record.differences]
        if disks:
            self._notes.append(
                f"without disks ({', '.join(disks)}): they are fixed at the instant by QMP only"
            )
        return msgspec.structs.replace(
            manifest,
            machine=record,
            notes=(*self._notes, *manifest.notes),
            without_disks=disks,
            statistics=self._statistics(),
        )

    def _statistics(self, state: JobState = "active") -> Statistics:
        return msgspec.structs.replace(
            self._control.progress.statistics(), state=state, phase=state
        )

    def _ended(self) -> str:
        """Wait for the migration's end and return QEMU's report on it. Raises MachineError."""
        while True:
            told = self._monitor.say("info migrate")
            found = _STATUS.search(told)
            status = (found[1] or found[2]) if found else "unknown"
            if status not in ("setup", "active", "device", "wait-unplug"):
                break
            time.sleep(_WAIT_S)
        if status != "completed":
            why = _WHY.search(told)
            raise MachineError(
                f"QEMU's migration is {status}",
                why=why[1] or why[2] if why else None,
                guest_state="running",
            )
        return told
