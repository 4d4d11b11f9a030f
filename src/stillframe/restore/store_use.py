"""The VMs that need a snapshot of a store: those that are filled from it, or lie on its disks."""

from __future__ import annotations

import glob
from collections.abc import Callable, Sequence

from stillframe.errors import BusyError
from stillframe.restore.disk_use import is_open
from stillframe.restore.restored import RestoredVm, list_restored
from stillframe.store.locations import Location, is_there, real
from stillframe.store.records import Entry, data_key
from stillframe.store.store import Store


def vms_that_need(store: Store) -> Callable[[Entry], str | None]:
    """Return a function for :meth:`Store.remove`: what on this host needs a snapshot, if visible.

    Any program that has a disk open counts; otherwise only VMs that this user restored.
    """

    def needed_by(entry: Entry) -> str | None:
        path = store.backend.path(data_key(entry.name))
        folder = None if path is None else path.with_name(f"{path.name}.disks")
        disks = sorted(folder.iterdir()) if folder is not None and folder.is_dir() else []
        place = real(store.location(entry))
        for vm in list_restored():
            if vm.snapshot == place and (vm.is_being_filled or (vm.disk_directory and disks)):
                return f"VM {vm.name} (pid {vm.pid})"
        if path is not None:
            for one in path.parent.glob(f"{glob.escape(path.name)}.reverted-*"):
                return f"a domain that went back to it ({one.name})"
        for disk in disks:
            if is_open(str(disk)):
                return f"a program that has its disk {disk.name} open"
        return None

    return needed_by


def end_if_removed(snapshot: Location, vms: Sequence[RestoredVm]) -> None:
    """End VMs whose snapshot was removed while they were started from it: they could not go on.

    Raises:
        BusyError: the snapshot was removed.
    """
    if not is_there(snapshot):
        for vm in vms:
            vm.kill()
        raise BusyError(f"the snapshot {snapshot} was removed meanwhile")
