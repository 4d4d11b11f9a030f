"""Clones of a running VM: from the instant on where possible, otherwise of a snapshot of it."""

from __future__ import annotations

import os
import shutil
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from pathlib import Path

import msgspec

from stillframe.disks.point_in_time import DiskOptions, planned_overlays
from stillframe.disks.refusals import DiskKind
from stillframe.errors import UsageError
from stillframe.machine.process.machine import ProcessMachine
from stillframe.model import MachineRecord, Manifest, Statistics
from stillframe.restore import take_restored
from stillframe.restore.clones import CloneOptions, ForkDirectory, plan_clones
from stillframe.restore.fork_domains import fork_running_domain
from stillframe.restore.fork_snapshot import fork_snapshot
from stillframe.restore.live_fork import LiveFork
from stillframe.restore.plan import check_plan
from stillframe.restore.plan_source import LiveSource
from stillframe.restore.private_directories import make_parents
from stillframe.restore.program import program_of
from stillframe.restore.records import RestorePlan
from stillframe.restore.restored import IMAGE_NAME, RestoredVm, disk_directories
from stillframe.snapshot.job import JobControl, SnapshotJob
from stillframe.snapshot.options import SnapshotOptions
from stillframe.snapshot.output import NoOutput
from stillframe.snapshot.stream_framing import block_records
from stillframe.snapshot.take import sees_our_files, take_into
from stillframe.snapshot.taken import TakenSnapshot
from stillframe.snapshot.taking import begin_take
from stillframe.still.host_mark import state_directory
from stillframe.still.sinks import aborting
from stillframe.still.writer import SnapshotWriter
from stillframe.store.backends.local import LocalSink
from stillframe.store.locations import Location
from stillframe.version import __version__

OnProgress = Callable[[Statistics], None]


def fork_running(
    machine: ProcessMachine,
    options: CloneOptions,
    directory: ForkDirectory,
    *,
    keep: Location | None,
    disks: DiskOptions,
    on_progress: OnProgress | None,
) -> list[RestoredVm]:
    """Start clones of a running VM, which goes on.

    Args:
        directory: what they share.
        keep: where to keep the snapshot; default: it is not kept.
        disks: ``copy`` or ``overlay``; the place is chosen here.

    Raises:
        UsageError and others: as ``take`` and ``restore``; no clone is left.
    """
    began_s = time.monotonic()
    if options.kind == "domain" and not machine.managed_by:
        raise UsageError("the VM is none of libvirt's", remedy="leave --as out")
    if machine.managed_by and options.kind != "qemu":
        return fork_running_domain(
            machine,
            options,
            keep=keep,
            take=lambda vm, file: _take(vm, file, SnapshotOptions(disks=disks), on_progress),
            parent=_name(machine.describe()),
        )
    if options.program is None:
        program, environment = program_of(machine.pid)
        options = msgspec.structs.replace(options, program=program, environment=environment)
    source, plans = plan_live(machine, options, freezes_disks=disks.kind == "overlay")
    if not plans:
        parent = source.description
        return _take_and_fork(machine, options, directory, keep, disks, on_progress, parent)
    check_plan(plans[0], trust=options.trust)
    kept_in = None if keep is None else os.path.realpath(keep)
    kind: DiskKind = "overlay" if disks.kind == "overlay" else "none"  # there are none to copy
    points = msgspec.structs.replace(disks, kind=kind, snapshot=kept_in)
    sink = None if keep is None else LocalSink(keep)
    output = NoOutput() if sink is None else SnapshotWriter(sink)
    reader = LiveFork(
        plans,
        source,
        kept_in=kept_in,
        record_path=directory.path / IMAGE_NAME,
        on_running=options.on_running,
        owns=[directory.lock],
        leases=disk_directories(machine.pid),
        began_s=began_s,
    )

    def work(control: JobControl) -> TakenSnapshot:
        reader.start()
        return take_into(control, machine, output, SnapshotOptions(disks=points), reader)

    with nullcontext() if sink is None else aborting(sink), reader:
        taken = SnapshotJob(work, on_progress=on_progress).finish()
        vms = reader.let_go(taken)
    directory.keep()
    return vms


def plan_live(
    machine: ProcessMachine, options: CloneOptions, *, freezes_disks: bool = False
) -> tuple[LiveSource, list[RestorePlan]]:
    """Plan clones that run from the instant on; nothing is touched.

    The plans are empty where that is impossible: the VM is not a QEMU, no image can hold its RAM,
    or it writes to disks whose copies of the instant come only later.

    Args:
        freezes_disks: its disks will be frozen, and it goes on in overlays, as the clones do.

    Raises:
        UsageError and others: as ``plan_restore``. MachineError: the monitor went away.
    """
    record = machine.describe()
    source = LiveSource(
        manifest=Manifest(
            created="", mode="background", stillframe_version=__version__, stream_bytes=0,
            blocks=block_records(machine.ram_blocks()), machine=record,
            captured_disks=planned_overlays(machine) if freezes_disks else (),
        ),
        description=_name(record),
        was_taken_here=sees_our_files(machine.pid),
    )  # fmt: skip
    if record.vmm != "qemu":
        return source, []
    plans = plan_clones(source, options)
    frozen = all(disk.captured for disk in plans[0].overlays)
    is_live = not plans[0].image.streamed and frozen
    return source, plans if is_live else []


def _take_and_fork(
    machine: ProcessMachine,
    options: CloneOptions,
    directory: ForkDirectory,
    keep: Location | None,
    disks: DiskOptions,
    on_progress: OnProgress | None,
    parent: str,
) -> list[RestoredVm]:
    """Take a snapshot first, then start clones of it."""
    began_s = time.monotonic()
    if keep is not None:
        _take(machine, keep, SnapshotOptions(disks=disks), on_progress)
        taken_s = time.monotonic() - began_s
        vms = fork_snapshot(keep, options, directory)
    else:
        file = directory.path / "fork.still"
        with _taken_disks(directory) as place:
            if disks.kind == "copy":
                disks = msgspec.structs.replace(disks, directory=str(place))
            _take(machine, file, SnapshotOptions(compression_level=1, disks=disks), on_progress)
            taken_s = time.monotonic() - began_s
            leases = [place] if place.exists() else []
            vms = fork_snapshot(file, options, directory, leases=leases, parent=parent)
        if vms[0].image_path is None:
            file.unlink(missing_ok=True)
    return vms if disks.kind == "overlay" else _with_price(vms, taken_s)


def _name(record: MachineRecord) -> str:
    """Return a description of a running VM, for people."""
    return f"{record.name or record.vmm} (pid {record.pid})"


def _with_price(vms: list[RestoredVm], taken_s: float) -> list[RestoredVm]:
    """Add a note to the clones if the disks are why everything was saved first."""
    if vms[0].disk_directory is None or vms[0].image_path is None:
        return vms
    note = (
        f"its disks were copied first, in {taken_s:.1f} s: clones run at once with --disks overlay"
    )
    return [msgspec.structs.replace(vm, notes=(*vm.notes, note)) for vm in vms]


def _take(
    machine: ProcessMachine,
    file: Location,
    options: SnapshotOptions,
    on_progress: OnProgress | None,
) -> None:
    begin_take(machine, file, options, origins=take_restored, on_progress=on_progress).finish()


@contextmanager
def _taken_disks(directory: ForkDirectory) -> Iterator[Path]:
    """Yield a place for copies of a running VM's disks, fit for large files; remove it on
    failure."""
    disks = state_directory() / "restored" / directory.path.name
    make_parents(disks)
    try:
        yield disks
    except BaseException:
        shutil.rmtree(disks, ignore_errors=True)
        raise
