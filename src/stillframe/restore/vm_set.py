"""VMs that are started together: their places, their processes, their records."""

from __future__ import annotations

import os
import shutil
import time
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from pathlib import Path

from stillframe.image.ram_image import ImageFiles
from stillframe.image.start import Start, Started
from stillframe.restore.disk_copies import copy_disk
from stillframe.restore.emulator import Emulator
from stillframe.restore.forwarded_ports import Forward, with_ports
from stillframe.restore.on_image import put_on_image
from stillframe.restore.overlays import make_overlays
from stillframe.restore.private_directories import make_directory, make_owned, remove, sweep
from stillframe.restore.records import RestorePlan, RunAs
from stillframe.restore.restored import ImageFile, RestoredVm, make_lease
from stillframe.store.processes import start_ticks


class VmSet:
    """VMs of one snapshot or instant.

    Args:
        plans: one for each VM, checked.
        path, snapshot_id: of the snapshot; empty if there is none.
        parent: the running VM that they are clones of.
        began_s: start of the whole restore or fork (monotonic clock).
        leases: disk directories that they share; killing the last VM removes them.
        owns: descriptors that every VM holds as long as it lives.

    ``disk_notes``: notes about their disks.
    """

    def __init__(
        self,
        plans: Sequence[RestorePlan],
        *,
        path: str,
        began_s: float,
        snapshot_id: str = "",
        parent: str = "",
        leases: Sequence[Path] = (),
        owns: Sequence[int] = (),
    ) -> None:
        self.plans = list(plans)
        self.began_s = began_s
        self.owns = tuple(owns)
        self.disk_notes: tuple[str, ...] = ()
        self.emulators: list[Emulator] = []
        self._path = path
        self._snapshot_id = snapshot_id
        self._parent = parent
        self._leases = leases
        self._made_leases: list[Path] = []
        self._forwards: dict[int, tuple[Forward, ...]] = {}
        self._own_locks: list[tuple[int, ...]] = []

    def make_places(self, until_started: ExitStack, on_failure: ExitStack) -> None:
        """Make their directories and disks.

        Args:
            until_started: closed once all VMs run. on_failure: closed if they do not.

        Raises:
            HostError, BusyError, DataError: not possible.
        """
        for plan in self.plans:
            own = _make_places(plan, until_started, on_failure)
            self._own_locks.append(() if own is None else (own,))
            make_disks(plan)

    def put_on_image(self, files: Mapping[int, int]) -> None:
        """See ``on_image.put_on_image``."""
        self.plans = [put_on_image(plan, files) for plan in self.plans]

    def start(self, number: int, files: Sequence[int] = ()) -> Emulator:
        """Start one VM.

        Args:
            files: descriptors that it inherits.

        Raises:
            HostError: it does not start.
        """
        inherits = (*self.owns, *self._own_locks[number], *files)
        self.emulators.append(Emulator(self.plans[number], inherits=inherits))
        return self.emulators[-1]

    def note_ports(self, start: Start) -> None:
        """Learn which ports a VM forwards, once its main loop runs.

        Raises:
            MachineError: its QEMU does not tell.
        """
        number = next(n for n, one in enumerate(self.emulators) if one is start.vmm)
        self._forwards[number] = with_ports(start.qmp, self.plans[number].forwards)

    def let_go(self) -> None:
        """Let the VMs live on without this process."""
        for emulator in self.emulators:
            emulator.let_go()

    def restored(
        self,
        number: int,
        started: Started,
        image_path: str | None,
        image_files: tuple[ImageFile, ...] = (),
    ) -> RestoredVm:
        """Return the record of one VM that runs, and make its leases."""
        plan, emulator = self.plans[number], self.emulators[number]
        leases = [make_lease(directory, plan.directory) for directory in self._leases]
        self._made_leases += leases
        words = emulator.last_words() if started.state != "running" else ""
        lead_ms = (emulator.began_s - self.began_s) * 1000
        return RestoredVm(
            pid=emulator.pid,
            started=start_ticks(emulator.pid),
            name=plan.name,
            snapshot=self._path,
            parent=self._parent,
            state=started.state,
            qmp_address=plan.qmp_address,
            log_path=plan.log_path,
            directory=plan.directory,
            disk_directory=plan.disk_directory if plan.overlays else None,
            sockets=tuple(touch.target for touch in plan.touches if touch.kind == "socket"),
            argv=plan.argv,
            forwards=self._forwards.get(number, ()),
            notes=(
                *plan.notes,
                *self.disk_notes,
                *([f"{plan.vmm_name} says: {words}"] if words else ()),
            ),
            image_path=image_path,
            snapshot_id=self._snapshot_id,
            began_s=self.began_s,
            image_files=image_files,
            leases=tuple(map(str, leases)),
            first_instruction_ms=None
            if started.running_ms is None
            else lead_ms + started.running_ms,
        )

    def since_begin_ms(self) -> float:
        """Return the time since the whole restore or fork began."""
        return (time.monotonic() - self.began_s) * 1000

    def kill(self) -> None:
        """End all VMs that were started, and give their leases up."""
        for emulator in self.emulators:
            emulator.kill()
        self.emulators.clear()
        for plan in self.plans:
            Path(plan.qmp_address).unlink(missing_ok=True)
        for lease in self._made_leases:
            lease.unlink(missing_ok=True)


def image_files(image: ImageFiles) -> tuple[ImageFile, ...]:
    """Return the files behind the RAM of VMs on an image."""
    return tuple(
        ImageFile(idstr=block.idstr, device=device, inode=inode)
        for block, (device, inode) in zip(image.blocks, image.identities, strict=True)
    )


def make_disks(plan: RestorePlan) -> None:
    """Make a plan's overlays and copies, in place of what is there."""
    for disk in plan.overlays:
        Path(disk.overlay).unlink(missing_ok=True)
    make_overlays([disk for disk in plan.overlays if disk.kind == "overlay"], plan.run_as)
    for disk in plan.overlays:
        if disk.kind == "copy":
            copy_disk(disk.base, disk.overlay)


def _make_places(plan: RestorePlan, until_started: ExitStack, on_failure: ExitStack) -> int | None:
    """Make a plan's directories. Return the lock for the new VM to hold: sockets and log are its
    own."""
    directory, disks = Path(plan.directory), Path(plan.disk_directory)
    if disks == directory:  # the caller's choice, and the caller's to remove
        _make(directory, on_failure, plan.run_as)
        return None
    sweep(directory.parent)
    owns = make_owned(directory, plan.run_as)
    until_started.callback(os.close, owns)
    on_failure.callback(remove, directory)
    if plan.overlays:
        _make(disks, on_failure, plan.run_as)
    return owns


def _make(directory: Path, on_failure: ExitStack, run_as: RunAs | None) -> None:
    make_directory(directory, run_as)
    on_failure.callback(shutil.rmtree, directory, ignore_errors=True)
