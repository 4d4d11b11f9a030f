"""Clones of a libvirt domain, as domains: from a snapshot of one, or from a running one.

Each clone has an image of its own. libvirt gives every domain a balloon, and what one clone gave
back of a shared image, all clones would lose (``restore.on_image``).
"""

from __future__ import annotations

import secrets
import shutil
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

from stillframe.errors import UsageError, host_error
from stillframe.machine.process.machine import ProcessMachine
from stillframe.restore.available import check_memory
from stillframe.restore.clones import CloneOptions, names_of_restored
from stillframe.restore.domain_plan import plan_domain
from stillframe.restore.private_directories import PASSABLE
from stillframe.restore.restore_domain import start_domain
from stillframe.restore.restored import RestoredVm, find_restored
from stillframe.restore.untouched import memory_needed_bytes
from stillframe.still.host_mark import state_directory
from stillframe.store import open_snapshot
from stillframe.store.keys import Keys
from stillframe.store.locations import Location


def is_of_domain(path: Location, keys: Keys | None) -> bool:
    """Whether a snapshot is of a libvirt domain.

    Raises:
        DataError and others: as ``open_snapshot``.
    """
    with open_snapshot(path, keys) as snapshot:
        machine = snapshot.manifest.machine
        return machine is not None and machine.domain is not None


def fork_domains(
    path: Location,
    options: CloneOptions,
    *,
    leases: Sequence[Path] = (),
    parent: str = "",
    keys: Keys | None = None,
) -> list[RestoredVm]:
    """Start domains from a snapshot, one after the other; if one does not start, none is left.

    Args:
        leases: disk directories that they share; killing the last clone removes them.
        parent: the running domain that the snapshot is of, if the snapshot is not kept.
        keys: for an encrypted snapshot.

    Raises:
        UsageError: an option that only a plain QEMU has. Otherwise as ``restore_domain``.
    """
    if options.extra_args or options.program:
        raise UsageError(
            "a domain of libvirt takes no options of QEMU, and no program",
            remedy="leave them out, or say --as qemu to start QEMUs without libvirt",
        )
    vms: list[RestoredVm] = []
    with open_snapshot(path, keys) as snapshot:
        machine = snapshot.manifest.machine
        check_memory(options.count * memory_needed_bytes(snapshot))
        try:
            for name in options.names("" if machine is None else machine.name, names_of_restored()):
                domain = start_domain(
                    plan_domain(snapshot, name=name),
                    snapshot,
                    trust=options.trust,
                    paused=options.paused,
                    wait=options.wait,
                    leases=leases,
                    parent=parent,
                )
                vms.append(find_restored(str(domain.pid)))
        except BaseException:
            for vm in vms:
                vm.kill()
            raise
    if options.on_running is not None:
        options.on_running(vms)
    return vms


def fork_running_domain(
    machine: ProcessMachine,
    options: CloneOptions,
    *,
    keep: Location | None,
    take: Callable[[ProcessMachine, Location], None],
    parent: str,
) -> list[RestoredVm]:
    """Start domains from a running one, which goes on; it is saved as a whole first.

    Args:
        keep: where to keep the snapshot; default: killing the last clone removes it.
        take: takes the snapshot, with copies of the disks beside it.
        parent: the running domain, for people.

    Raises:
        UsageError and others: as ``take`` and :func:`fork_domains`.
    """
    if keep is not None:
        take(machine, keep)
        return fork_domains(keep, options)
    with _place() as place:
        file = place / "fork.still"
        take(machine, file)
        return fork_domains(file, options, leases=[place], parent=parent)


@contextmanager
def _place() -> Iterator[Path]:
    """Make a place, fit for large files, for a snapshot and its disks; remove it on failure."""
    place = state_directory() / "restored" / f"domains-{secrets.token_hex(6)}"
    try:
        for directory in (place.parent.parent, place.parent, place):
            directory.mkdir(mode=0o700, parents=True, exist_ok=True)
            directory.chmod(PASSABLE)
    except OSError as error:
        raise host_error(f"cannot make the directory {place}", error) from error
    try:
        yield place
    except BaseException:
        shutil.rmtree(place, ignore_errors=True)
        raise
