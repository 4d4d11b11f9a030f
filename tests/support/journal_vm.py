"""VMs with the journal guest on two disks, and whether a snapshot of them shows one instant."""

from __future__ import annotations

import hashlib
import os
import subprocess
import time
from pathlib import Path
from typing import Any

from guests import journal
from guests.qemu import RAM_ID, GuestVm
from stillframe.disks.drives import OURS
from stillframe.disks.point_in_time import DiskOptions
from stillframe.model import CapturedDisk, Manifest
from stillframe.qmp.client import QmpClient
from stillframe.snapshot.taken import TakenSnapshot
from stillframe.still.export_qemu import export_qemu
from stillframe.store import open_snapshot
from stillframe.store.backends.local import LocalSink
from tests.support.taking import take

WORKERS = 8


def qemu_img(*words: object) -> str:
    """Run it, again where the key derivation of a LUKS image could not measure the CPU.

    It gives up when one round takes less than a clock tick; SHA-512 takes longer than SHA-256.
    """
    for _ in range(50):
        done = subprocess.run(
            ["qemu-img", *map(str, words)], capture_output=True, text=True, check=False
        )
        if "accurate CPU usage" not in done.stderr:
            break
    assert done.returncode == 0, f"qemu-img {words}: {done.stderr}"
    return done.stdout


def make_disks(directory: Path, image_format: str) -> list[Path]:
    """Empty disks for the journal."""
    disks = [directory / f"disk{number}.{image_format}" for number in range(journal.DISKS)]
    for disk, size in zip(disks, journal.DISK_BYTES, strict=True):
        qemu_img("create", "-q", "-f", image_format, disk, size)
    return disks


def disk_arguments(
    disks: list[Path], image_format: str, *, bus: str = "blk", iothread: bool = False
) -> list[str]:
    """QEMU's options for them."""
    words: list[str] = []
    thread = ",iothread=io0" if iothread else ""
    if iothread:
        words += ["-object", "iothread,id=io0"]
    if bus == "scsi":
        words += ["-device", f"virtio-scsi-pci,id=scsi{thread}"]
    for number, disk in enumerate(disks):
        # File names of this test have no commas.
        drive = f"file={disk},if=none,id=d{number},format={image_format},cache=writeback"
        device = (
            f"scsi-hd,drive=d{number}"
            if bus == "scsi"
            else f"virtio-blk-pci,drive=d{number}{thread}"
        )
        words += ["-drive", drive, "-device", device]
    return words


def journal_options(arguments: list[str], **options: Any) -> dict[str, Any]:
    """What a ``linux_guest`` with the journal is started with."""
    return {
        "vcpus": 2,
        "mem_mib": 8,
        "rate_mib_per_s": 2,
        "append": f"sf.journal={WORKERS} sf.rest_us=2000",
        "extra": arguments,
        **options,
    }


def take_with_disks(vm: GuestVm, file: Path, kind: str, **options: Any) -> TakenSnapshot:
    """As the api does, in this process."""
    disks = DiskOptions(kind=kind, snapshot=str(file), max_drain_ms=5000.0, **options)  # type: ignore[arg-type]
    return take(vm, file, disks=disks)


def manifest_of(file: Path) -> Manifest:
    with open_snapshot(file) as snapshot:
        return snapshot.manifest


def captured_path(file: Path, disk: CapturedDisk) -> Path:
    """The top image of a captured disk."""
    return file.parent / disk.files[0].path


def torn(
    file: Path, scratch: Path, *, disks: list[Path] | None = None, block: str = RAM_ID
) -> list[str]:
    """Why RAM and disks of a snapshot are not of one instant; empty if they are.

    Args:
        disks: images to look at instead of the captured ones. block: the guest's RAM.
    """
    with open_snapshot(file) as snapshot:
        workers = journal.workers_in(page for _, page in snapshot.iter_pages(block) if page)
        captured = snapshot.manifest.captured_disks[: journal.DISKS]  # an agent's is the last
    raws = []
    for number, disk in enumerate(captured):
        raw = scratch / f"raw{number}"
        if disks is None:
            image, image_format = captured_path(file, disk), disk.files[0].format
        else:
            image, image_format = disks[number], disk.files[0].format
        qemu_img("convert", "-U", "-f", image_format, "-O", "raw", image, raw)
        raws.append(raw)
    found = journal.problems(workers, raws)
    for raw in raws:
        raw.unlink()
    return found


def check_images(file: Path) -> None:
    """``qemu-img check`` finds nothing in what was captured, and the digests are right."""
    for disk in manifest_of(file).captured_disks:
        for frozen in disk.files:
            if frozen.format == "qcow2":
                qemu_img("check", "-U", "-q", "-f", "qcow2", file.parent / frozen.path)


def digest(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()


def export_stream(file: Path, stream: Path) -> None:
    with open_snapshot(file) as snapshot:
        sink = LocalSink(stream)
        export_qemu(snapshot, sink)


def fill_disk(disk: Path) -> None:
    """Make a raw disk take long to copy: random, but for the rings, where the guest may not have
    been yet when it is taken."""
    rings = WORKERS * journal.RING * journal.BLOCK_BYTES
    disk.write_bytes(bytes(rings) + os.urandom(disk.stat().st_size - rings))


def overlays_over(file: Path, directory: Path) -> list[Path]:
    """What a restored VM would write to."""
    overlays = []
    for number, disk in enumerate(manifest_of(file).captured_disks):
        overlay = directory / f"restored{number}.qcow2"
        image = captured_path(file, disk)
        below = ["-b", image, "-F", disk.files[0].format]
        qemu_img("create", "-q", "-u", "-f", "qcow2", *below, overlay, disk.virtual_size_bytes)
        overlays.append(overlay)
    return overlays


def writes(qmp_path: Path) -> int:
    """Disk writes of the guest so far."""
    with QmpClient.connect(str(qmp_path), timeout_s=60) as qmp:
        stats: Any = qmp.execute("query-blockstats")
        return sum(entry["stats"]["wr_operations"] for entry in stats)


def assert_writes_on(vm: GuestVm, within_s: float = 180.0, qmp_path: Path | None = None) -> None:
    """The guest writes to its disks. (On a busy host a flush alone may take seconds.)

    Args:
        qmp_path: a monitor that is free, if the usual is not.
    """
    monitor = qmp_path or vm.qmp_path
    before, deadline = writes(monitor), time.monotonic() + within_s
    while writes(monitor) < before + 4:
        assert time.monotonic() < deadline, "the guest does not write any more"
        time.sleep(0.05)
    assert not any("journal FAILED" in line for line in vm.console.lines())


def nodes_of_ours(vm: GuestVm) -> list[str]:
    """Names of jobs and nodes that stillframe made and that are still there."""
    with QmpClient.connect(str(vm.qmp_path), timeout_s=60) as qmp:
        nodes: Any = qmp.execute("query-named-block-nodes")
        jobs: Any = qmp.execute("query-jobs")
    names = [node["node-name"] for node in nodes] + [job["id"] for job in jobs]
    return [name for name in names if name.startswith(OURS)]
