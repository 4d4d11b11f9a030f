"""Clones of a running VM that writes to disks: RAM and disks of each are of one instant."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import msgspec
import pytest

from guests import journal
from guests.qemu import RAM_ID, GuestVm
from guests.serial import SerialConsole
from stillframe import api
from stillframe.disks import folding
from stillframe.disks.point_in_time import PointInTime
from stillframe.errors import MachineError, UsageError
from stillframe.restore import restored
from stillframe.restore.restored import RestoredVm, list_restored
from tests.support.held_fork import HeldFork, held_fork
from tests.support.image_vm import PAGE, read_ram
from tests.support.journal_vm import (
    WORKERS,
    assert_writes_on,
    journal_options,
    nodes_of_ours,
    qemu_img,
    torn,
    writes,
)
from tests.support.probes import has_linux_guest, has_uffd_wp
from tests.support.taking import REPOSITORY

pytestmark = [pytest.mark.qemu, pytest.mark.timeout(300)]

SLOW_MS = 60_000.0
"""A loaded host's disk is not what is tested."""
OVERLAY: dict[str, Any] = {"disks": "overlay", "max_drain_ms": SLOW_MS}


class Source:
    """A VM whose journal writes to two disks; ``disks``: their images. ``second``: a monitor that
    no fork uses."""

    def __init__(self, vm: GuestVm, disks: list[Path], second: Path) -> None:
        self.vm, self.disks, self.second = vm, disks, second

    def assert_as_before(self) -> None:
        """It writes on, to its own images, with nothing of ours left."""
        assert_writes_on(self.vm)
        assert nodes_of_ours(self.vm) == []
        directory = self.disks[0].parent
        assert sorted(directory.glob("disk*")) == sorted(self.disks)


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Source]:
    """One disk is raw, by ``-drive``, with an I/O thread; the other a qcow2 by ``-blockdev``."""
    has_linux_guest().require()
    has_uffd_wp().require()
    directory = tmp_path_factory.mktemp("disks")
    raw, qcow2 = disks = [directory / "disk0.raw", directory / "disk1.qcow2"]
    qemu_img("create", "-q", "-f", "raw", raw, journal.DISK_BYTES[0])
    qemu_img("create", "-q", "-f", "qcow2", qcow2, journal.DISK_BYTES[1])
    second = directory / "second.sock"
    words = [
        *("-object", "iothread,id=io0"),
        *("-drive", f"file={raw},if=none,id=d0,format=raw"),
        *("-device", "virtio-blk-pci,drive=d0,iothread=io0"),
        *("-blockdev", f"qcow2,node-name=n1,file.driver=file,file.filename={qcow2}"),
        *("-device", "virtio-blk-pci,drive=n1,id=v1"),
        *("-qmp", f"unix:{second},server=on,wait=off"),
    ]
    options: dict[str, Any] = journal_options(words, ram_mib=160, name="origin")
    with GuestVm("linux", **options).start() as vm:
        assert_writes_on(vm)
        yield Source(vm, disks, second)


@pytest.fixture(autouse=True)
def _places(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.setenv("XDG_RUNTIME_DIR", str(tmp_path))
    monkeypatch.setattr(restored, "ROOTS_RUN", tmp_path / "stillframe")  # not others' VMs
    tmp_path.chmod(0o700)
    yield
    for vm in list_restored():
        vm.kill()


def problems(clone: RestoredVm, scratch: Path) -> list[str]:
    """Why RAM and disks of a paused clone are not of one instant; empty if they are."""
    ram = read_ram(clone.pid, clone.qmp_address)[RAM_ID]
    workers = journal.workers_in(
        bytes(ram[start : start + PAGE]) for start in range(0, len(ram), PAGE)
    )
    assert len(workers) == WORKERS
    assert clone.disk_directory is not None
    raws = []
    for number, overlay in enumerate(sorted(Path(clone.disk_directory).glob("*.qcow2"))):
        raws.append(scratch / f"raw{number}")
        qemu_img("convert", "-U", "-f", "qcow2", "-O", "raw", overlay, raws[-1])
    assert len(raws) == journal.DISKS
    return journal.problems(workers, raws)


def assert_clone_writes_on(clone: RestoredVm) -> None:
    """It writes to its disks, and what it reads from them is what its memory says."""
    console = SerialConsole(next(Path(path) for path in clone.sockets if "serial" in path))
    try:
        assert console.is_progressing()
        before = writes(Path(clone.qmp_address))
        while writes(Path(clone.qmp_address)) < before + 4:
            assert console.is_progressing()
        assert not any("journal FAILED" in line for line in console.lines())
    finally:
        console.close()


def test_every_clone_shows_one_instant(source: Source, tmp_path: Path) -> None:
    """Also what is read when the VM has written on to both; then it is on its own images again."""
    with held_fork(source.vm.pid, 2, paused=True, **OVERLAY) as fork:
        assert_writes_on(source.vm, qmp_path=source.second)  # and none of RAM was swept yet
        for clone in fork.vms:
            assert problems(clone, tmp_path) == []
    assert any("until 'stillframe commit'" in note for note in fork.done[0].notes)
    assert not any("devices or media changed" in note for note in fork.done[0].notes)
    for clone in fork.done:
        assert problems(clone, tmp_path) == []
    fork.vms[0].kill()
    kept = api.commit(source.vm.pid)
    assert [one.overlays for one in kept] == [(), ()]
    assert {holder for one in kept for holder in one.needed_by} == {f"process {fork.vms[1].pid}"}
    assert problems(fork.vms[1], tmp_path) == []
    fork.vms[1].kill()
    assert [len(one.overlays) for one in api.commit(source.vm.pid, force=True)] == [1, 1]
    source.assert_as_before()


def test_clones_go_on_with_their_disks(source: Source, tmp_path: Path) -> None:
    file = tmp_path / "kept.still"
    clones = api.fork(source.vm.pid, 2, keep=file, **OVERLAY)
    for clone in clones:
        assert clone.image_path is not None
        assert_clone_writes_on(clone)
    assert_writes_on(source.vm)
    assert torn(file, tmp_path) == []
    for clone in clones:
        clone.kill()
    (one, _) = api.commit(source.vm.pid)
    assert one.needed_by == (str(file),)
    (again,) = api.fork(file)
    assert_clone_writes_on(again)
    again.kill()
    file.unlink()
    api.commit(source.vm.pid)
    source.assert_as_before()


def test_a_clone_of_a_clone_holds_the_image(source: Source, tmp_path: Path) -> None:
    """Also when the one between is gone, and although force would give a snapshot up. The last one
    takes along what they had together."""
    (child,) = api.fork(source.vm.pid, **OVERLAY)
    (grandchild,) = api.fork(child.pid, paused=True, **OVERLAY)
    assert_clone_writes_on(child)
    child.kill()
    assert [one.overlays for one in api.commit(source.vm.pid, force=True)] == [(), ()]
    # It would fold what is nobody's.
    api.take(source.vm.pid, tmp_path / "x.still", max_drain_ms=SLOW_MS).wait(120)
    assert_writes_on(source.vm)
    assert problems(grandchild, tmp_path) == []
    assert child.disk_directory is not None
    assert Path(child.disk_directory).exists()
    grandchild.kill()
    assert not Path(child.disk_directory).exists()
    api.commit(source.vm.pid)
    source.assert_as_before()


def test_a_snapshot_of_a_clone_holds_its_disks(source: Source, tmp_path: Path) -> None:
    """``kill`` leaves the images that it shows."""
    (clone,) = api.fork(source.vm.pid, **OVERLAY)
    file = tmp_path / "x.still"
    api.take(clone.pid, file, **OVERLAY).wait(120)
    clone.kill()
    assert torn(file, tmp_path) == []
    (again,) = api.fork(file)
    assert_clone_writes_on(again)
    again.kill()
    file.unlink()
    api.commit(source.vm.pid)
    source.assert_as_before()


def test_a_fork_that_fails_goes_back(source: Source, monkeypatch: pytest.MonkeyPatch) -> None:
    """The clones end first: from then on their images are written to."""
    fold, running = folding.fold, []

    def watched(*arguments: Any, **options: Any) -> Any:
        running.append([vm.name for vm in list_restored()])
        return fold(*arguments, **options)

    def fail(_self: PointInTime, _step: Any) -> Any:
        raise MachineError("no more", guest_state="running")

    monkeypatch.setattr(folding, "fold", watched)
    monkeypatch.setattr(PointInTime, "finish", fail)
    with HeldFork(source.vm.pid, 2, **OVERLAY) as fork:
        assert len(list_restored()) == 2
        running.clear()  # what the job began with
    assert str(fork.failure) == "no more"
    assert running == [[]]
    source.assert_as_before()


def test_the_forking_process_dies(source: Source) -> None:
    """The clones end with it, and the next commit folds the overlays."""
    child = subprocess.Popen(
        [sys.executable, "-m", "tests.support.held_fork", str(source.vm.pid), "1", "overlay"],
        cwd=REPOSITORY, stdin=subprocess.PIPE, stdout=subprocess.PIPE,
    )  # fmt: skip
    assert child.stdout is not None
    (clone,) = msgspec.json.decode(child.stdout.readline(), type=list[RestoredVm])
    child.kill()
    child.communicate()
    with pytest.raises(MachineError):
        clone.wait_resident(60)
    clone.kill()
    assert [len(one.overlays) for one in api.commit(source.vm.pid)] == [1, 1]
    source.assert_as_before()


def test_copies_come_first(source: Source) -> None:
    """The usual way: the VM is as before, and what that costs is said."""
    (clone,) = api.fork(source.vm.pid, max_drain_ms=SLOW_MS)
    assert any("--disks overlay" in note for note in clone.notes)
    assert (clone.snapshot, clone.parent) == ("", f"origin (pid {source.vm.pid})")
    source.assert_as_before()
    assert_clone_writes_on(clone)
    with pytest.raises(UsageError):
        api.fork(source.vm.pid, disks="none")
