"""Facts about a restored VM for a take of it: whether all of its RAM is there, and what the VM has
changed since."""

from __future__ import annotations

import time
from collections.abc import Callable
from pathlib import Path

from stillframe.errors import BusyError, NotFoundError, StillframeError, UsageError
from stillframe.image.filling import Filling
from stillframe.image.own_pages import OwnPages
from stillframe.restore.restored import RestoredVm, find_restored, hand_over

_POLL_S = 0.02
_NO_PROGRESS_S = 120.0


def await_resident(ref: str | int, step: Callable[[float], None]) -> None:
    """Wait until a VM's image is filled, if this user restored it and it runs on one: a snapshot of
    it would have holes. If no process fills the image, let one do so from now on.

    Call this before asking its monitor anything: while a vCPU waits for a page, QEMU's main loop
    may wait for that vCPU.

    Args:
        ref: its pid, monitor or name. For a VM that this user did not restore, return at once.
        step: called meanwhile with the share that is there, 0 to 1; what it raises ends the wait.

    Raises:
        BusyError: the filling makes no progress. DataError, NotFoundError: the snapshot that the VM
            was restored from is damaged or gone, so its RAM will never be whole.
    """
    vm = _restored(ref)
    if vm is None or vm.image_path is None:
        return
    path, seen, since_s = Path(vm.image_path), -1.0, time.monotonic()
    while vm.is_running and path.exists():
        there = vm.resident() or 0.0
        step(there)
        if there != seen:
            seen, since_s = there, time.monotonic()
        elif time.monotonic() - since_s > _NO_PROGRESS_S:
            raise BusyError(
                f"the image of VM {vm.pid} is still being filled",
                why=f"nothing came for {_NO_PROGRESS_S:g} s",
                remedy=f"see {path.with_suffix('.log')}",
                guest_state="running",
            )
        _see_that_it_is_filled(path)
        time.sleep(_POLL_S)


def _see_that_it_is_filled(path: Path) -> None:
    try:
        filling = Filling.adopt(path)
    except BusyError:
        return
    except StillframeError:
        if path.exists():
            raise
        return
    try:
        hand_over(filling, path)
    finally:
        filling.close()


def own_pages(pid: int, snapshot_id: str) -> OwnPages | None:
    """Return what a clone has changed since that snapshot; None if it is not on its image."""
    vm = _restored(pid)
    if vm is None or vm.snapshot_id != snapshot_id or not vm.image_files:
        return None
    files = {one.idstr: (one.device, one.inode, one.changed_ns) for one in vm.image_files}
    return OwnPages(pid, files)


def origin_of(pid: int) -> str | None:
    """Return the id of the snapshot that a VM was restored from; None if that is unknown."""
    vm = _restored(pid)
    return None if vm is None else vm.snapshot_id or None


def is_frozen(pid: int) -> bool:
    """Whether a VM was restored from a snapshot of a frozen guest, and could not be thawed."""
    vm = _restored(pid)
    return vm is not None and vm.frozen


def _restored(ref: str | int) -> RestoredVm | None:
    try:
        return find_restored(str(ref))
    except (NotFoundError, UsageError):
        return None
