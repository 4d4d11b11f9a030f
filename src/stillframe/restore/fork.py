"""Clones of a snapshot, or of a running VM."""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from pathlib import Path

from stillframe.disks.point_in_time import DEFAULT_MAX_DRAIN_MS, DiskOptions
from stillframe.disks.refusals import DiskKind
from stillframe.errors import NotFoundError, UsageError, check_choice
from stillframe.machine.finding import connect
from stillframe.model import Statistics
from stillframe.restore.clones import CloneKind, CloneOptions, ForkDirectory
from stillframe.restore.fork_domains import fork_domains, is_of_domain
from stillframe.restore.fork_running import fork_running
from stillframe.restore.fork_snapshot import fork_snapshot
from stillframe.restore.restored import RestoredVm
from stillframe.restore.store_use import end_if_removed
from stillframe.restore.take_restored import await_resident
from stillframe.store.backends.bucket import is_bucket_url
from stillframe.store.keys import Keys
from stillframe.store.locations import Location
from stillframe.store.named import locate


def fork(
    target: Location | int,
    count: int = 1,
    *,
    name: str | None = None,
    keep: Location | None = None,
    disks: DiskKind | None = None,
    max_drain_ms: float = DEFAULT_MAX_DRAIN_MS,
    trust: bool = False,
    extra_args: Sequence[str] = (),
    program: str | None = None,
    paused: bool = False,
    wait: bool = False,
    fill: bool = False,
    kind: CloneKind | None = None,
    keys: Keys | None = None,
    on_running: Callable[[list[RestoredVm]], None] | None = None,
    on_progress: Callable[[Statistics], None] | None = None,
) -> list[RestoredVm]:
    """Start clones of a snapshot or of a running VM; they share one image of its RAM.

    Pages that the clones only read are in memory once; each clone owns the pages that it wrote. A
    running VM goes on, after a downtime as of ``take``. Its clones run from the instant on, while
    their RAM is saved; this returns when all of it is there, and if this process dies before, the
    clones end. A VM whose RAM no image can hold, or whose disks are copied, is saved as a whole
    first.

    Args:
        target: a snapshot's file or its name in the store; otherwise a VM, as for ``connect``.
        count: how many clones.
        name: of the clones; ``{n}`` in it is their number, from 1. Default: the VM's, and ``-{n}``.
        keep: for a running VM: where to keep the snapshot; default: it is not kept.
        disks: for a running VM: ``copy`` (default) copies the disks that it writes to, leaves the
            VM as it is, and the clones run once the copies are done; ``overlay`` freezes its disks,
            the clones run at once, and the VM goes on in overlays of its own until ``commit``.
        kind: for a libvirt domain: ``domain`` (default) makes domains, each with an image of its
            own, after a complete snapshot; ``qemu`` makes QEMUs without libvirt.
        max_drain_ms: for a running VM: as for ``take``.
        program: default for a running VM: its own.
        on_running: called once all clones run, for a running VM from another thread; must be quick.
        on_progress: for a running VM: as for ``take``.

    The other arguments are those of ``restore``.

    Raises:
        UsageError: an invalid number or name. Otherwise as ``take`` and ``restore``: if one clone
            does not start, none is left, and a running VM runs on.
    """
    if disks is not None:
        check_choice("disks", disks, ("copy", "overlay"))
    options = CloneOptions(
        count=count,
        name=name,
        trust=trust,
        extra_args=extra_args,
        program=program,
        paused=paused,
        wait=wait,
        fill=fill,
        kind=kind,
        on_running=on_running,
    )
    with ForkDirectory() as directory:
        file = None if isinstance(target, int) else _snapshot_file(target, keys)
        if file is not None:
            if keep is not None:
                raise UsageError(f"{target} is a snapshot already", remedy="leave --keep out")
            if disks is not None:
                raise UsageError(f"{target} has its disks already", remedy="leave --disks out")
            if kind == "domain" or (kind is None and is_of_domain(file, keys)):
                clones = fork_domains(file, options, keys=keys)
            else:
                clones = fork_snapshot(file, options, directory, keys=keys)
            end_if_removed(file, clones)
            return clones
        vm = target if isinstance(target, int) else os.fspath(target)
        await_resident(vm, lambda _there: None)
        with connect(vm) as machine:
            await_resident(machine.pid, lambda _there: None)
            return fork_running(
                machine,
                options,
                directory,
                keep=keep,
                disks=DiskOptions(kind=disks or "copy", max_drain_ms=max_drain_ms),
                on_progress=on_progress,
            )


def _snapshot_file(target: Location, keys: Keys | None) -> Location | None:
    """Return the snapshot that ``target`` names; None if it is a VM."""
    if Path(target).is_file() or is_bucket_url(os.fspath(target)):
        return target
    if os.fspath(target).isdecimal():  # a pid
        return None
    try:
        located = locate(target, keys=keys)
    except NotFoundError:
        return None
    return None if located is target else located
