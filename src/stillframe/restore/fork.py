"""Starts clones of a snapshot, or of a running VM."""

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

    What they read is in memory once, each owns what it has written. A running VM goes on, after a
    downtime as of ``take``. Its clones run from the instant on, while their RAM is saved; this
    returns when all of it is there, and if this process dies before, the clones end. A VM whose
    RAM cannot be an image's, or whose disks are copied, is saved as a whole first.

    Args:
        target: a snapshot's file or its name in the store; else a VM, as for ``connect``.
        count: how many clones.
        name: of the clones; ``{n}`` in it is their number, from 1. Else the VM's, and ``-{n}``.
        keep: of a running VM: where the snapshot is to stay; else there is none.
        disks: of a running VM: ``copy`` what it writes to, the usual, which leaves it as it is,
            and the clones run once that is done; or ``overlay``: its disks are frozen, clones run
            at once, and it goes on in overlays of its own until ``commit``.
        kind: of a domain of libvirt: ``domain``, the usual: domains again, each with an image of
            its own, after a snapshot as a whole; or ``qemu``: QEMUs without libvirt.
        max_drain_ms: of a running VM: as for ``take``.
        program: else, of a running VM, its own.
        on_running: called once all clones run, from another thread; must be quick.
        on_progress: of a running VM: as for ``take``.

    The other arguments are those of ``restore``.

    Raises:
        UsageError: a number or a name that makes no sense. Else as ``take`` and ``restore``: where
            one clone does not start, none is left, and a running VM runs on.
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
    """The snapshot that a target is; None if it is a VM."""
    if Path(target).is_file() or is_bucket_url(os.fspath(target)):
        return target
    if os.fspath(target).isdecimal():  # a pid
        return None
    try:
        located = locate(target, keys=keys)
    except NotFoundError:
        return None
    return None if located is target else located
