"""Disks on a file system with reflinks: cloned, and the VM back on its images at once."""

from __future__ import annotations

import contextlib
import errno
import os
import signal
import subprocess
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from guests.qemu import GuestVm
from stillframe import api
from stillframe.disks import clones, folding
from stillframe.disks.clones import DiskClones
from stillframe.disks.targets import Target
from stillframe.errors import SinkError, StillframeError
from stillframe.qmp.client import QmpClient
from tests.support.journal_vm import (
    assert_writes_on,
    captured_path,
    check_images,
    disk_arguments,
    export_stream,
    fill_disk,
    journal_options,
    make_disks,
    manifest_of,
    nodes_of_ours,
    overlays_over,
    qemu_img,
    take_with_disks,
    torn,
)
from tests.support.probes import has_uffd_wp
from tests.support.reflink_place import fill, reflink_place, shares_blocks
from tests.support.taking import finish, start_take

pytestmark = [pytest.mark.qemu, pytest.mark.timeout(300)]

GuestFactory = Callable[..., GuestVm]


@pytest.fixture(params=["xfs"])
def place(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[Path]:
    has_uffd_wp().require()
    with reflink_place(request.param, tmp_path) as mounted:
        yield mounted


def files_in_use(vm: GuestVm, monitor: Path | None = None) -> list[str]:
    """The images that the VM's drives are on."""
    with QmpClient.connect(str(monitor or vm.qmp_path), timeout_s=60) as qmp:
        drives: Any = qmp.execute("query-block")
        return [drive["inserted"]["file"] for drive in drives if "inserted" in drive]


def assert_no_trace(vm: GuestVm, disks: list[Path]) -> None:
    """The VM writes on, to its own images, and no overlay is left."""
    assert_writes_on(vm)
    assert files_in_use(vm) == [str(disk) for disk in disks]
    assert nodes_of_ours(vm) == []
    assert folding.MARK not in " ".join(os.listdir(disks[0].parent))


@pytest.mark.parametrize(
    ("place", "image_format"),
    [("xfs", "raw"), ("xfs", "qcow2"), ("btrfs", "raw")],
    indirect=["place"],
)
def test_ram_and_clones_show_one_instant(
    place: Path, linux_guest: GuestFactory, tmp_path: Path, image_format: str
) -> None:
    disks = make_disks(place, image_format)
    for disk in disks:  # what the guest leaves alone stays shared
        words = ["-f", image_format, "-c", "write -q -P 5 20M 1M", str(disk)]
        subprocess.run(["qemu-io", *words], check=True)
    vm = linux_guest(**journal_options(disk_arguments(disks, image_format)))
    assert_writes_on(vm)
    file = place / "taken.still"
    take_with_disks(vm, file, "copy")
    assert_no_trace(vm, disks)
    assert torn(file, tmp_path) == []
    check_images(file)
    captured = manifest_of(file).captured_disks
    assert [disk.files[0].format for disk in captured] == [image_format] * 2
    assert all(disk.kind == "copy" for disk in captured)
    assert all(shares_blocks(captured_path(file, disk)) for disk in captured)


def test_a_chain_is_cloned_whole_and_restored_from_elsewhere(
    place: Path, linux_guest: GuestFactory, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    bases, disks = make_disks(place, "raw"), []
    for base in bases:
        with base.open("r+b") as file_below:
            os.pwrite(file_below.fileno(), b"\5" * 4096, 20 << 20)
        disks.append(place / f"{base.stem}.qcow2")
        qemu_img("create", "-q", "-f", "qcow2", "-b", base, "-F", "raw", disks[-1])
    second = tmp_path / "second.sock"
    words = ["-qmp", f"unix:{second},server=on,wait=off", *disk_arguments(disks, "qcow2")]
    vm = linux_guest(**journal_options(words))
    assert_writes_on(vm)
    taken, file = place / "taken.still", place / "elsewhere" / "moved.still"
    seal, in_use = Target.seal, []

    def look_and_seal(self: Target) -> None:
        in_use.append(files_in_use(vm, second))
        seal(self)

    monkeypatch.setattr(Target, "seal", look_and_seal)
    take_with_disks(vm, taken, "copy")
    assert in_use == [[str(disk) for disk in disks]] * 4  # long before the snapshot was complete
    assert_no_trace(vm, disks)
    file.parent.mkdir()
    taken.rename(file)
    taken.with_name("taken.still.disks").rename(place / "elsewhere" / "taken.still.disks")
    assert [len(disk.files) for disk in manifest_of(file).captured_disks] == [2, 2]
    for base in bases:
        base.write_bytes(b"")  # the clones need nothing but each other
    assert torn(file, tmp_path) == []
    for disk in manifest_of(file).captured_disks:
        words = ["-r", "-f", "qcow2", "-c", "read -q -P 5 20M 4k", str(captured_path(file, disk))]
        subprocess.run(["qemu-io", *words], check=True)
    stream = tmp_path / "stream"
    export_stream(file, stream)
    words = disk_arguments(overlays_over(file, place), "qcow2")
    incoming = ["-incoming", f"exec:cat {stream}"]
    assert_writes_on(linux_guest(**journal_options([*words, *incoming]), wait_ready=False))


@pytest.mark.parametrize("point", ["stopped", "disks", "continued"])
def test_the_guard_folds_back(place: Path, linux_guest: GuestFactory, point: str) -> None:
    disks = make_disks(place, "qcow2")
    vm = linux_guest(**journal_options(disk_arguments(disks, "qcow2")))
    assert_writes_on(vm)
    process = start_take(vm, place / "x.still", "--max-drain", "5000", fault=f"{point}=kill")
    assert finish(process)[0] == -signal.SIGKILL
    deadline = time.monotonic() + 120
    while nodes_of_ours(vm) or folding.MARK in " ".join(os.listdir(place)):
        assert time.monotonic() < deadline, (nodes_of_ours(vm), os.listdir(place))
        time.sleep(0.05)
    assert_no_trace(vm, disks)
    assert not (place / "x.still").exists()


@pytest.mark.parametrize("comes", ["take", "commit"])
def test_without_a_guard_the_next_one_folds_back(
    place: Path, linux_guest: GuestFactory, tmp_path: Path, comes: str
) -> None:
    disks = make_disks(place, "raw")
    second = tmp_path / "second.sock"
    words = ["-qmp", f"unix:{second},server=on,wait=off", *disk_arguments(disks, "raw")]
    vm = linux_guest(**journal_options(words))
    assert_writes_on(vm)
    process = start_take(vm, place / "x.still", "--max-drain", "5000", fault="disks=hang")
    deadline = time.monotonic() + 60
    while not all(folding.MARK in name for name in files_in_use(vm, second)):
        assert time.monotonic() < deadline
        time.sleep(0.05)
    for pid in (*guards_of(process.pid), process.pid):
        os.kill(pid, signal.SIGKILL)
    finish(process)
    with QmpClient.connect(str(second)) as qmp:
        qmp.execute("cont")
    assert_writes_on(vm)
    if comes == "commit":
        api.commit(str(vm.qmp_path))
    else:
        take_with_disks(vm, place / "next.still", "copy")
        assert torn(place / "next.still", tmp_path) == []
    assert_no_trace(vm, disks)


def guards_of(pid: int) -> list[int]:
    found = []
    for child in Path(f"/proc/{pid}/task/{pid}/children").read_text().split():
        with contextlib.suppress(FileNotFoundError):  # it has ended
            if b"guard_process" in Path(f"/proc/{child}/cmdline").read_bytes():
                found.append(int(child))
    return found


def test_without_room_nothing_is_begun(place: Path, linux_guest: GuestFactory) -> None:
    """What the guest overwrites later takes room, so that of a copy must be there."""
    disks = full_disks(place)
    vm = linux_guest(**journal_options(disk_arguments(disks, "raw")))
    assert_writes_on(vm)
    fill(place, 20 << 20)
    with pytest.raises(SinkError, match="no room for the copy"):
        take_with_disks(vm, place.parent / "x.still", "copy", directory=str(place / "copies"))
    assert_no_trace(vm, disks)


def test_a_file_system_that_fills_up_meanwhile(
    place: Path, linux_guest: GuestFactory, monkeypatch: pytest.MonkeyPatch
) -> None:
    disks = full_disks(place)
    vm = linux_guest(**journal_options(disk_arguments(disks, "raw")))
    assert_writes_on(vm)

    def fill_and_fail(*_: object) -> None:
        if not (place / "ballast").exists():
            fill(place, 1 << 20)
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    def go_without_room(self: DiskClones) -> None:
        monkeypatch.setattr(clones, "_clone_range", fill_and_fail)
        go(self)

    go = DiskClones.go
    monkeypatch.setattr(DiskClones, "go", go_without_room)
    with pytest.raises(SinkError, match=r"could not be cloned.*No space left"):
        take_with_disks(vm, place.parent / "x.still", "copy", directory=str(place / "copies"))
    assert_no_trace(vm, disks)
    assert not (place / "copies").exists()


def test_a_vm_that_ends_meanwhile_keeps_what_it_wrote(
    place: Path, linux_guest: GuestFactory, monkeypatch: pytest.MonkeyPatch
) -> None:
    disks = make_disks(place, "qcow2")
    second = place.parent / "second.sock"
    words = ["-qmp", f"unix:{second},server=on,wait=off", *disk_arguments(disks, "qcow2")]
    vm = linux_guest(**journal_options(words))
    assert_writes_on(vm)
    clone, fold_of_ended = clones._Layer.clone, folding.fold_of_ended
    seen: list[bytes] = []

    def clone_and_end(self: clones._Layer, stop: Any) -> None:
        clone(self, stop)
        if not seen:
            seen.append(b"")
            with QmpClient.connect(str(second)) as qmp:
                before = _writes(qmp)
                while _writes(qmp) < before + 8:
                    time.sleep(0.02)
                qmp.execute("quit")

    def look_and_fold(path: str) -> None:
        seen.append(_content(path))
        fold_of_ended(path)

    monkeypatch.setattr(clones._Layer, "clone", clone_and_end)
    monkeypatch.setattr(folding, "fold_of_ended", look_and_fold)
    with pytest.raises(StillframeError):
        take_with_disks(vm, place / "x.still", "copy")
    assert sorted(os.listdir(place)) == sorted(disk.name for disk in disks)
    assert seen[1:] == [_content(str(disk)) for disk in disks]


def full_disks(place: Path) -> list[Path]:
    """With room of their own for all that the guest may write."""
    disks = make_disks(place, "raw")
    for disk in disks:
        fill_disk(disk)
    return disks


def _writes(qmp: QmpClient) -> int:
    stats: Any = qmp.execute("query-blockstats")
    return sum(entry["stats"]["wr_operations"] for entry in stats)


def _content(image: str) -> bytes:
    raw = Path(f"{image}.raw")
    qemu_img("convert", "-f", "qcow2", "-O", "raw", image, raw)
    content = raw.read_bytes()
    raw.unlink()
    return content
