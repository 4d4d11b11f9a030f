"""Take a running QEMU and start the snapshot beside it: what the two have is compared."""

from __future__ import annotations

import contextlib
import os
import signal
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import msgspec

from guests.qemu import qemu_binary
from stillframe.errors import SnapshotFailed
from stillframe.machine.finding import connect
from stillframe.machine.process.machine import ProcessMachine
from stillframe.model import MachineRecord
from stillframe.restore.start import RestoredVm, restore
from stillframe.snapshot.job import SnapshotJob
from stillframe.snapshot.options import SnapshotOptions
from stillframe.snapshot.take import take_snapshot
from stillframe.snapshot.taken import TakenSnapshot
from stillframe.store import open_snapshot
from stillframe.store.backends.local import LocalSink

_TIMEOUT_S = 120.0


class RoundTrip(msgspec.Struct, frozen=True, kw_only=True):
    """A snapshot, what it says of its machine, and the new VM (connected)."""

    taken: TakenSnapshot
    record: MachineRecord
    new: ProcessMachine
    vm: RestoredVm


def take_machine(machine: ProcessMachine, file: Path, **options: Any) -> TakenSnapshot:
    job = SnapshotJob(
        lambda control: take_snapshot(control, machine, LocalSink(file), SnapshotOptions(**options))
    )
    return job.wait(_TIMEOUT_S)


def settled(take: Callable[[], TakenSnapshot]) -> TakenSnapshot:
    """The firmware resizes blocks after each reset, which ends a take; another one is taken."""
    for _ in range(20):
        try:
            return take()
        except SnapshotFailed as error:
            if "RAM blocks changed" not in error.what:
                raise
    raise AssertionError("the VM does not settle")


def machine_record(file: Path) -> MachineRecord:
    with open_snapshot(file) as snapshot:
        record = snapshot.manifest.machine
    assert record is not None
    return record


@contextlib.contextmanager
def round_trip(ref: str, directory: Path, **options: Any) -> Iterator[RoundTrip]:
    """Take the VM and restore it; ``options`` are those of ``restore``. The new one is killed."""
    file = directory / "x.still"
    with connect(ref) as machine:
        taken = settled(lambda: take_machine(machine, file))
    given = {"directory": directory / "vm", "program": qemu_binary()} | options
    vm = restore(file, **given)
    try:
        with connect(vm.qmp_address) as new:
            yield RoundTrip(taken=taken, record=machine_record(file), new=new, vm=vm)
    finally:
        with contextlib.suppress(ProcessLookupError):
            os.kill(vm.pid, signal.SIGKILL)


def devices(machine: ProcessMachine) -> dict[str, str]:
    """Name to type of the devices with an id."""
    listed: Any = machine.qmp.execute("qom-list", {"path": "/machine/peripheral"})
    return {item["name"]: item["type"] for item in listed if item["type"].startswith("child<")}


def media(machine: ProcessMachine) -> dict[str, list[str]]:
    """Of each block device, by device id or drive id: the files of its images but overlays of
    the restore's own."""
    found = {}
    record = machine.describe()
    for disk in record.disks:
        name = disk.qdev.removesuffix("/virtio-backend").rpartition("/")[2]
        name = disk.device if "[" in name or not name else name
        files = [str(Path(record.cwd, image.filename)) for image in disk.images]
        found[name] = [file for file in files if "/vm/disk" not in file]
    return found
