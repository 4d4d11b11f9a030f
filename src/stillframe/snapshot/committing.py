"""Folding a VM's overlays back, the work of ``stillframe commit``."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import closing

from stillframe.disks.folding import Fold, fold, plan_folds
from stillframe.errors import UsageError
from stillframe.machine.finding import connect
from stillframe.machine.process.machine import ProcessMachine
from stillframe.snapshot.exclusive import VmLock


def commit(
    vm: str | int | ProcessMachine,
    *,
    dry_run: bool = False,
    force: bool = False,
    progress: Callable[[int, int], None] | None = None,
) -> tuple[Fold, ...]:
    """Fold the overlays of a running QEMU's disks back into the images below, while it runs.

    An image that a snapshot needs stays unchanged, and so does its backing chain.

    Args:
        vm: as for ``connect``; or a machine, which the caller still has to close.
        dry_run: only report what would be done.
        force: give up the snapshots that need an image; their disks can no longer be restored.
        progress: called with (bytes done, total bytes), for one disk after the other.

    Returns:
        What was folded, or would be, for each disk that has overlays of ours.

    Raises:
        NotFoundError, UsageError, HostError: as ``connect``.
        BusyError: a snapshot is under way, or a block job is using a disk.
        RefusedError: another program uses an image. MachineError: the VM does not answer, or the
            disk could not be written. The guest runs on in any case.
    """
    if isinstance(vm, str | int):
        with connect(vm) as machine:
            return commit(machine, dry_run=dry_run, force=force, progress=progress)
    if vm.info.vmm != "qemu":
        raise UsageError("only a QEMU's disks have overlays of ours")
    if dry_run:
        return plan_folds(vm.qmp, vm.pid, also_pinned=force)
    with closing(VmLock(vm.lock_name)):
        step = progress if progress is not None else lambda done, total: None
        return fold(vm.qmp, vm.pid, also_pinned=force, step=step)
