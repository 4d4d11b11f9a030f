"""RAM and disks of one instant: the journal guest on two disks, under load."""

from __future__ import annotations

import subprocess
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from guests import journal
from guests.qemu import GuestVm
from stillframe import api
from stillframe.disks.point_in_time import PointInTime
from tests.support.journal_vm import (
    WORKERS,
    assert_writes_on,
    captured_path,
    check_images,
    digest,
    disk_arguments,
    export_stream,
    journal_options,
    make_disks,
    manifest_of,
    nodes_of_ours,
    overlays_over,
    qemu_img,
    take_with_disks,
    torn,
    writes,
)
from tests.support.probes import has_uffd_wp
from tests.support.taking import command
from tests.support.waiting import wait_until

pytestmark = [pytest.mark.qemu, pytest.mark.timeout(300)]

SNAPSHOTS = 2
GuestFactory = Callable[..., GuestVm]


@pytest.fixture(autouse=True)
def _needs() -> None:
    has_uffd_wp().require()


@pytest.mark.parametrize(
    ("image_format", "bus", "iothread"),
    [
        ("raw", "blk", True),
        ("qcow2", "blk", False),
        ("qcow2", "scsi", True),
        ("raw", "scsi", False),
    ],
)
@pytest.mark.parametrize("kind", ["copy", "overlay"])
def test_ram_and_disks_show_one_instant(
    linux_guest: GuestFactory,
    tmp_path: Path,
    image_format: str,
    bus: str,
    iothread: bool,
    kind: str,
) -> None:
    disks = make_disks(tmp_path, image_format)
    words = disk_arguments(disks, image_format, bus=bus, iothread=iothread)
    vm = linux_guest(**journal_options(words))
    assert_writes_on(vm)
    hashes: dict[Path, str] = {}
    for number in range(SNAPSHOTS):
        file = tmp_path / f"{number}.still"
        take_with_disks(vm, file, kind)
        assert torn(file, tmp_path) == []
        check_images(file)
        for disk in manifest_of(file).captured_disks:
            assert disk.kind == kind
            image = captured_path(file, disk)
            hashes[image] = digest(image)
    assert_writes_on(vm)
    assert {path: digest(path) for path in hashes} == hashes, "a frozen image was written to"
    for number in range(SNAPSHOTS):
        assert torn(tmp_path / f"{number}.still", tmp_path) == []
        (tmp_path / f"{number}.still").unlink()
    api.commit(str(vm.qmp_path))
    assert nodes_of_ours(vm) == []
    assert_writes_on(vm)
    left = {path.name for path in tmp_path.iterdir() if path.suffix != ".disks"}
    assert left == {disk.name for disk in disks}


@pytest.mark.parametrize("kind", ["copy", "overlay"])
def test_a_restored_guest_finds_its_disks(
    linux_guest: GuestFactory, tmp_path: Path, kind: str
) -> None:
    """The source runs on meanwhile; the guest itself compares each block with its memory."""
    disks = make_disks(tmp_path, "qcow2")
    vm = linux_guest(**journal_options(disk_arguments(disks, "qcow2")))
    assert_writes_on(vm)
    file, stream = tmp_path / "x.still", tmp_path / "stream"
    take_with_disks(vm, file, kind)
    export_stream(file, stream)
    words = disk_arguments(overlays_over(file, tmp_path), "qcow2")
    incoming = ["-incoming", f"exec:cat {stream}"]
    restored = linux_guest(**journal_options([*words, *incoming]), wait_ready=False)
    assert_writes_on(restored)
    time.sleep(1.0)
    assert_writes_on(restored)
    assert_writes_on(vm)


def test_disks_taken_after_the_instant_are_found_out(
    linux_guest: GuestFactory, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The control: with the transaction after the writes that follow cont, it must fail."""
    disks = make_disks(tmp_path, "raw")
    second = tmp_path / "second"
    words = ["-qmp", f"unix:{second},server=on,wait=off", *disk_arguments(disks, "raw")]
    vm = linux_guest(**journal_options(words))
    assert_writes_on(vm)
    in_stop, after_instant = PointInTime.in_stop, PointInTime.after_instant

    def late(self: PointInTime) -> None:
        # More than each worker had under way on each disk.
        enough = writes(second) + 2 * journal.DISKS * WORKERS
        wait_until(lambda: writes(second) > enough)
        in_stop(self)
        after_instant(self)

    monkeypatch.setattr(PointInTime, "in_stop", lambda _self: None)
    monkeypatch.setattr(PointInTime, "after_instant", late)
    file = tmp_path / "x.still"
    take_with_disks(vm, file, "copy")
    assert torn(file, tmp_path)


def test_a_copy_is_what_the_disk_was(linux_guest: GuestFactory, tmp_path: Path) -> None:
    """Of a paused guest nothing changes, so copy and disk are equal."""
    disks = make_disks(tmp_path, "qcow2")
    vm = linux_guest(**journal_options(disk_arguments(disks, "qcow2")))
    assert_writes_on(vm)
    with api.connect(str(vm.qmp_path)) as machine:
        machine.stop()
        file = tmp_path / "x.still"
        api.take(machine, file, max_drain_ms=5000).wait(60)
        assert machine.status() == "paused"
    for disk, captured in zip(disks, manifest_of(file).captured_disks, strict=True):
        qemu_img("compare", "-U", disk, captured_path(file, captured))


def test_without_disks_says_so(linux_guest: GuestFactory, tmp_path: Path) -> None:
    disks = make_disks(tmp_path, "raw")
    vm = linux_guest(extra=disk_arguments(disks, "raw"))
    file = tmp_path / "x.still"
    take_with_disks(vm, file, "none")
    assert manifest_of(file).without_disks == ("d0", "d1")
    shown = subprocess.run(command("show", str(file)), capture_output=True, text=True, check=True)
    assert "without disks" in shown.stdout
