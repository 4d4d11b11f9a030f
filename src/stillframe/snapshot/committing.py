"""Folds the overlays of takes back, as ``stillframe commit`` does."""

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

    An image that a snapshot needs stays as it is, with what lies below it.

    Args:
        vm: as for ``connect``; or a machine, which stays the caller's to close.
        dry_run: only say what would be done.
        force: give snapshots up that need an image; they cannot be restored with disks then.
        progress: called with bytes done and bytes in all, of one disk after the other.

    Returns:
        What was, or would be, folded, of each disk that has overlays of ours.

    Raises:
        NotFoundError, UsageError, HostError: as ``connect``.
        BusyError: a snapshot is under way, or a block job works on a disk.
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
