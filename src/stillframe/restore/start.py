"""Carries a restore plan out: starts the VM, streams the snapshot in, waits until it runs."""

from __future__ import annotations

import os
import shutil
import time
from collections.abc import Sequence
from contextlib import ExitStack
from pathlib import Path

import msgspec

from stillframe.errors import BusyError, MachineError, NotFoundError
from stillframe.machine.outside.evidence import as_map
from stillframe.qmp.client import QmpClient
from stillframe.restore.disk_copies import copy_disk
from stillframe.restore.emulator import Emulator
from stillframe.restore.feed import Progress, feed
from stillframe.restore.overlays import make_overlays
from stillframe.restore.owned import make_owned, remove, sweep
from stillframe.restore.places import make_directory
from stillframe.restore.plan import check_plan, plan_restore
from stillframe.restore.records import RestorePlan
from stillframe.store.snapshot import Snapshot

_START_TIMEOUT_S = 30.0
_LOAD_TIMEOUT_S = 60.0
_POLL_S = 0.01


class RestoredVm(msgspec.Struct, frozen=True, kw_only=True):
    """A VM that was started from a snapshot, and that goes on without us.

    ``state``: QEMU's run state, ``running`` or ``paused``. ``qmp_address``: path of its monitor.
    ``sockets``: all that it listens on, the monitor among them.
    ``directory``: its sockets and log; ``disk_directory``: its overlays, if it has any. Both are
    for the caller to remove once the VM has ended. Where the caller chose no directory, the next
    restore sweeps sockets and log away; the overlays stay, since they hold what the VM wrote.
    """

    pid: int
    name: str
    state: str
    qmp_address: str
    log_path: str
    directory: str
    disk_directory: str | None
    sockets: tuple[str, ...]
    argv: tuple[str, ...]
    notes: tuple[str, ...]


def restore(
    path: str | os.PathLike[str],
    *,
    qmp_socket: str | None = None,
    trust: bool = False,
    extra_args: Sequence[str] = (),
    program: str | None = None,
    paused: bool = False,
    directory: Path | None = None,
    on_progress: Progress | None = None,
) -> RestoredVm:
    """Start a new VM from a snapshot file. The VM that it was taken of is not touched.

    The new VM runs if the old one ran at the snapshot's instant and ``paused`` is not set; else
    it is paused. It needs no process of ours afterwards. Every frame is checked on its way.

    Args:
        trust: the caller has read the plan, and answers for a file that is not the caller's own
            or that runs programs of the host.
        on_progress: called with bytes sent and bytes in all.

    The other arguments are those of :func:`stillframe.restore.plan.plan_restore`.

    Raises:
        NotFoundError: there is no such file, or a file of the VM is gone.
        TrustError: read the plan first. RefusedError: an option cannot be used.
        UsageError, HostError: see ``plan_restore``; also, a directory cannot be made.
        DataError: the snapshot is damaged. MachineError: the VMM's own words.
        Whatever is raised, no VM and no file is left behind.
    """
    with Snapshot.open(path) as snapshot:
        plan = plan_restore(
            snapshot,
            qmp_socket=qmp_socket,
            extra_args=extra_args,
            program=program,
            paused=paused,
            directory=directory,
        )
        return carry_out(plan, snapshot, trust=trust, on_progress=on_progress)


def carry_out(
    plan: RestorePlan,
    snapshot: Snapshot,
    *,
    trust: bool = False,
    on_progress: Progress | None = None,
) -> RestoredVm:
    """Do what a plan says, as :func:`restore` does; same errors."""
    check_plan(plan, trust=trust)
    with ExitStack() as until_started, ExitStack() as on_failure:
        owns = _make_places(plan, until_started, on_failure)
        make_overlays([disk for disk in plan.overlays if disk.kind == "overlay"])
        for disk in plan.overlays:
            if disk.kind == "copy":
                copy_disk(disk.base, disk.overlay)
        emulator = Emulator(plan, owns=owns)
        until_started.close()
        on_failure.callback(Path(plan.qmp_address).unlink, missing_ok=True)
        on_failure.callback(emulator.kill)
        with _connect(plan.qmp_address, emulator) as qmp:
            feed(snapshot, emulator, on_progress)
            state = _wait_loaded(qmp, emulator)
        on_failure.pop_all()
    emulator.let_go()
    return RestoredVm(
        pid=emulator.pid,
        name=plan.name,
        state=state,
        qmp_address=plan.qmp_address,
        log_path=plan.log_path,
        directory=plan.directory,
        disk_directory=plan.disk_directory if plan.overlays else None,
        sockets=tuple(touch.target for touch in plan.touches if touch.kind == "socket"),
        argv=plan.argv,
        notes=plan.notes,
    )


def _make_places(plan: RestorePlan, until_started: ExitStack, on_failure: ExitStack) -> int | None:
    """Its directories. What is returned is for the new VM to hold: sockets and log belong to it."""
    directory, disks = Path(plan.directory), Path(plan.disk_directory)
    if disks == directory:  # the caller's choice, and the caller's to remove
        _make(directory, on_failure)
        return None
    sweep(directory.parent)
    owns = make_owned(directory)
    until_started.callback(os.close, owns)
    on_failure.callback(remove, directory)
    if plan.overlays:
        _make(disks, on_failure)
    return owns


def _make(directory: Path, on_failure: ExitStack) -> None:
    make_directory(directory)
    on_failure.callback(shutil.rmtree, directory, ignore_errors=True)


def _connect(address: str, emulator: Emulator) -> QmpClient:
    """Connect to the new VM's monitor as soon as it is there."""
    deadline_s = time.monotonic() + _START_TIMEOUT_S
    while True:
        if emulator.has_ended():
            raise emulator.failure("starting")
        try:
            return QmpClient.connect(address, timeout_s=_START_TIMEOUT_S)
        except (NotFoundError, MachineError, BusyError):
            if time.monotonic() > deadline_s:
                raise
        time.sleep(_POLL_S)


def _wait_loaded(qmp: QmpClient, emulator: Emulator) -> str:
    """Wait until the new VM has left its incoming state; its run state then."""
    deadline_s = time.monotonic() + _LOAD_TIMEOUT_S
    state = "inmigrate"
    while state == "inmigrate":
        try:
            state = str(as_map(qmp.execute("query-status")).get("status") or "")
            migration = as_map(qmp.execute("query-migrate"))
        except MachineError:
            if emulator.wait_end(1.0):
                raise emulator.failure("loading the snapshot") from None
            raise
        if migration.get("status") == "failed":
            why = migration.get("error-desc")
            raise emulator.failure("loading the snapshot", str(why) if why else None)
        if time.monotonic() > deadline_s:
            raise MachineError(
                f"{emulator.vmm_name} has not taken the snapshot in after {_LOAD_TIMEOUT_S:g} s",
                why=emulator.last_words() or None,
                guest_state="none",
            )
        if state == "inmigrate":
            time.sleep(_POLL_S)
    return state
