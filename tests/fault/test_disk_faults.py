"""What goes wrong with disks: kill -9, a target that fails, a source that fails."""

from __future__ import annotations

import os
import signal
import subprocess
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from pathlib import Path

import pytest

from guests.qemu import GuestVm
from stillframe import api
from stillframe.disks import copies
from stillframe.disks.copies import DiskCopies
from stillframe.disks.drives import OURS
from stillframe.disks.targets import Target
from stillframe.errors import SinkError, SnapshotFailed, StillframeError
from stillframe.qmp.client import QmpClient
from stillframe.qmp.replies import as_list, as_map
from tests.support.bare_vm import BareVm
from tests.support.disk_killing import kill_takes
from tests.support.journal_vm import (
    assert_writes_on,
    disk_arguments,
    fill_disk,
    journal_options,
    make_disks,
    nodes_of_ours,
    take_with_disks,
    torn,
)
from tests.support.listening import wait_listening
from tests.support.probes import has_uffd_wp
from tests.support.small_file_system import mounted_tmpfs
from tests.support.taking import command, finish, start_take
from tests.support.waiting import wait_until

pytestmark = [pytest.mark.qemu, pytest.mark.timeout(300)]

KILLS = 5
GuestFactory = Callable[..., GuestVm]


@pytest.fixture(autouse=True)
def _needs() -> None:
    has_uffd_wp().require()


@pytest.fixture
def small_ext4(tmp_path: Path) -> Iterator[tuple[Path, Path]]:
    """An ext4 of 256 MiB, mounted; and the file that it is in."""
    place, image = tmp_path / "mounted", tmp_path / "image"
    with image.open("wb") as file:
        file.truncate(256 << 20)
    place.mkdir()
    for words in (["mkfs.ext4", "-q", "-F", str(image)], ["mount", str(image), str(place)]):
        if subprocess.run(words, capture_output=True, check=False).returncode != 0:
            pytest.skip(f"missing {words[0]}: no file system can be made and mounted here")
    try:
        yield place, image
    finally:
        subprocess.run(["umount", "-l", str(place)], capture_output=True, check=False)


@pytest.mark.parametrize("kind", ["copy", "overlay"])
def test_kill_9_at_any_moment(linux_guest: GuestFactory, tmp_path: Path, kind: str) -> None:
    disks = make_disks(tmp_path, "qcow2")
    vm = linux_guest(**journal_options(disk_arguments(disks, "qcow2")))
    kill_takes(vm, disks, tmp_path, kind, KILLS)


def test_kill_9_while_the_targets_are_made(tmp_path: Path) -> None:
    """As soon as there is a node of the first disk; there are to be those of seven more."""
    words: list[str] = []
    for n in range(8):
        (tmp_path / f"d{n}").write_bytes(bytes(1 << 20))
        words += ["-drive", f"file={tmp_path}/d{n},format=raw,if=none,id=d{n}"]
        words += ["-device", f"virtio-blk-pci,drive=d{n}"]
    with BareVm(*words) as vm, QmpClient.connect(vm.second_qmp, timeout_s=60) as qmp:

        def ours() -> list[str]:
            nodes = as_list(qmp.execute("query-named-block-nodes", {"flat": True}))
            names = (str(as_map(node).get("node-name")) for node in nodes)
            return [name for name in names if name.startswith(OURS)]

        kills = 0
        for _ in range(10 * KILLS):
            take = command("take", vm.qmp, "-o", str(tmp_path / "x.still"), "--quiet")
            process = subprocess.Popen([*take, "--force"], stderr=subprocess.DEVNULL)
            while process.poll() is None and not ours():
                pass
            process.kill()
            # One that was through before we saw a node, on a busy host, was not killed.
            kills += process.wait() == -signal.SIGKILL
            wait_until(lambda: not ours())
            if kills == KILLS:
                break
        assert kills == KILLS


@pytest.mark.parametrize("kind", ["copy", "overlay"])
@pytest.mark.parametrize("point", ["stopped", "disks", "continued", "swept", "copied", "manifest"])
def test_a_failure_takes_everything_back(
    linux_guest: GuestFactory, tmp_path: Path, kind: str, point: str
) -> None:
    disks = make_disks(tmp_path, "qcow2")
    vm = linux_guest(extra=disk_arguments(disks, "qcow2"))
    process = start_take(vm, tmp_path / "x.still", "--disks", kind, fault=point)
    code, _output, complaints = finish(process)
    assert code == 70, complaints
    assert vm.is_progressing()
    assert nodes_of_ours(vm) == []
    assert {path.name for path in tmp_path.iterdir()} == {disk.name for disk in disks}


def test_a_target_that_fills_up_never_reaches_the_guest(
    linux_guest: GuestFactory, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The reservation is left out, so that writes to the copy really fail."""
    disks, small = make_disks(tmp_path, "raw"), tmp_path / "small"
    for disk in disks:
        fill_disk(disk)
    vm = linux_guest(**journal_options(disk_arguments(disks, "raw")))
    assert_writes_on(vm)
    with mounted_tmpfs(small, "size=1m"):
        monkeypatch.setattr(Target, "reserve", lambda *_arguments: None)
        with pytest.raises(SinkError, match="could not be written"):
            take_with_disks(vm, tmp_path / "x.still", "copy", directory=str(small))
        assert vm.is_progressing()
        assert_writes_on(vm)
        assert nodes_of_ours(vm) == []
        assert not (tmp_path / "x.still").exists()
        assert list(small.iterdir()) == []


def test_a_target_that_hangs_is_given_up(
    linux_guest: GuestFactory,
    tmp_path: Path,
    small_ext4: tuple[Path, Path],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Its file system is frozen (fsfreeze(8)), and no write to it comes back. The take ends; the
    guest's processor runs, and once the file system answers, so does its disk."""
    (place, _image), disks = small_ext4, make_disks(tmp_path, "raw")
    fill_disk(disks[0])
    vm = linux_guest(**journal_options(disk_arguments(disks, "raw")))
    assert_writes_on(vm)
    with ExitStack() as stack:
        go = DiskCopies.go

        def go_into_ice(self: DiskCopies) -> None:
            go(self)
            subprocess.run(["fsfreeze", "-f", str(place)], check=True)
            stack.callback(subprocess.run, ["fsfreeze", "-u", str(place)], check=False)

        # At full speed the copy might be complete before the ice.
        monkeypatch.setattr(copies, "_FULL_SPEED", 1 << 20)
        monkeypatch.setattr(copies, "_STILL_S", 3.0)
        monkeypatch.setattr(copies, "_GONE_S", 1.0)
        monkeypatch.setattr(DiskCopies, "go", go_into_ice)
        with pytest.raises(SinkError, match=r"copy of disk .* stands still"):
            take_with_disks(vm, tmp_path / "x.still", "copy", directory=str(place))
        with api.connect(str(vm.qmp_path)) as machine:
            assert machine.status() == "running"
        assert not (tmp_path / "x.still").exists()
    monkeypatch.undo()
    assert_writes_on(vm)
    take_with_disks(vm, tmp_path / "next.still", "copy")
    assert torn(tmp_path / "next.still", tmp_path) == []
    assert nodes_of_ours(vm) == []


def test_a_source_that_fails_is_named(linux_guest: GuestFactory, tmp_path: Path) -> None:
    """The disk's own error (werror=stop): the take fails, and the guest is left to its user."""
    disks, rules = make_disks(tmp_path, "raw"), tmp_path / "rules"
    # Reads beyond the journal fail: those of the copy, and no other ones.
    sector = (16 << 20) // 512
    rules.write_text(f'[inject-error]\nevent = "read_aio"\nsector = "{sector}"\nerrno = "5"\n')
    words: list[str] = []
    for number, disk in enumerate(disks):
        fill_disk(disk)
        words += ["-blockdev", f"file,node-name=f{number},filename={disk}"]
        words += ["-blockdev", f"blkdebug,node-name=b{number},image=f{number},config={rules}"]
        words += ["-blockdev", f"raw,node-name=n{number},file=b{number}"]
        words += ["-device", f"virtio-blk-pci,drive=n{number},werror=stop,rerror=stop"]
    vm = linux_guest(**journal_options(words))
    assert_writes_on(vm)
    with pytest.raises(SnapshotFailed, match=r"copy of disk .* failed.*Input/output error"):
        take_with_disks(vm, tmp_path / "x.still", "copy")
    assert vm.is_progressing()
    assert_writes_on(vm)
    assert nodes_of_ours(vm) == []
    assert not (tmp_path / "x.still").exists()


@pytest.mark.parametrize("how", ["storage", "mount"])
def test_a_target_that_vanishes(
    linux_guest: GuestFactory,
    tmp_path: Path,
    small_ext4: tuple[Path, Path],
    monkeypatch: pytest.MonkeyPatch,
    how: str,
) -> None:
    """What its file system is on is gone while the copy is made, or it is mounted no more."""
    (place, image), disks = small_ext4, make_disks(tmp_path, "raw")
    fill_disk(disks[0])
    vm = linux_guest(**journal_options(disk_arguments(disks, "raw")))
    assert_writes_on(vm)
    go = DiskCopies.go

    def go_nowhere(self: DiskCopies) -> None:
        if how == "storage":
            os.truncate(image, 1 << 20)
        else:
            subprocess.run(["umount", "-l", str(place)], check=True)
        go(self)

    monkeypatch.setattr(DiskCopies, "go", go_nowhere)
    with pytest.raises(SinkError) as caught:
        take_with_disks(vm, tmp_path / "x.still", "copy", directory=str(place))
    assert "copy" in str(caught.value) or str(place) in str(caught.value)
    assert vm.is_progressing()
    assert_writes_on(vm)
    assert nodes_of_ours(vm) == []
    assert not (tmp_path / "x.still").exists()


def test_a_disk_that_fails_under_the_guest_meanwhile(
    linux_guest: GuestFactory, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A write of the guest's fails (werror=stop) while its disk is copied. It stays stopped for its
    user, whose ``cont`` tries the write again; the copy is of the instant before."""
    disks, rules = make_disks(tmp_path, "raw"), tmp_path / "rules"
    # A write that is not aligned, which the guest has none of, makes the next one fail.
    rules.write_text(
        '[set-state]\nevent = "pwritev_rmw_head"\nstate = "1"\nnew_state = "2"\n'
        '[inject-error]\nevent = "write_aio"\nstate = "2"\nerrno = "5"\nonce = "on"\n'
    )
    words: list[str] = []
    for number, disk in enumerate(disks):
        fill_disk(disk)
        drive = f"if=none,id=d{number},format=raw,werror=stop,rerror=stop,file.align=4096"
        drive += f",file.driver=blkdebug,file.config={rules},file.image.filename={disk}"
        words += ["-drive", drive, "-device", f"virtio-blk-pci,drive=d{number}"]
    words += ["-qmp", f"unix:{tmp_path}/second,server=on,wait=off"]
    vm = linux_guest(**journal_options(words))
    assert_writes_on(vm)
    go = DiskCopies.go

    def go_and_fail(self: DiskCopies) -> None:
        go(self)
        with QmpClient.connect(str(tmp_path / "second"), timeout_s=60) as qmp:
            qmp.hmp('qemu-io d0 "write -q 25165825 10"')
            wait_until(lambda: as_map(qmp.execute("query-status"))["status"] == "io-error")

    monkeypatch.setattr(DiskCopies, "go", go_and_fail)
    file = tmp_path / "x.still"
    take_with_disks(vm, file, "copy")
    with QmpClient.connect(str(vm.qmp_path)) as qmp:
        assert as_map(qmp.execute("query-status"))["status"] == "io-error"
        qmp.execute("cont")
    assert_writes_on(vm)
    assert torn(file, tmp_path) == []
    assert nodes_of_ours(vm) == []


def wait_slow(vm: GuestVm, device: str, least_ms: float) -> None:
    """Until a write takes so long; the guest may still be far from filling its queue."""

    def writes() -> tuple[int, int]:
        (entry,) = (entry for entry in as_list(qmp.execute("query-blockstats"))
                    if as_map(entry)["device"] == device)  # fmt: skip
        stats = as_map(as_map(entry)["stats"])
        return int(str(stats["wr_operations"])), int(str(stats["wr_total_time_ns"]))

    def slow() -> bool:
        before = writes()
        time.sleep(0.5)
        count, total_ns = (now - then for now, then in zip(writes(), before, strict=True))
        return count > 0 and total_ns / count / 1e6 > least_ms

    with QmpClient.connect(str(vm.qmp_path)) as qmp:
        wait_until(slow, f"disk {device} did not get slow")


def test_a_slow_disk_is_refused_by_name(linux_guest: GuestFactory, tmp_path: Path) -> None:
    """Throttled below QEMU, as slow storage is: a server that takes its time."""
    disks, socket = make_disks(tmp_path, "raw"), tmp_path / "nbd"
    options = "driver=raw,file.driver=throttle,file.throttle-group=t,file.file.driver=file"
    options += f",file.file.filename={disks[0]}"
    server = subprocess.Popen(
        ["qemu-nbd", "-t", "-e", "4", "-k", str(socket),
         "--object", "throttle-group,id=t,x-iops-total=10", "--image-opts", options]
    )  # fmt: skip
    try:
        wait_listening(socket, alive=lambda: server.poll() is None)
        first = ["-drive", f"file=nbd+unix:///?socket={socket},if=none,id=slow,format=raw"]
        first += ["-device", "virtio-blk-pci,drive=slow"]
        vm = linux_guest(**journal_options([*first, *disk_arguments(disks[1:], "raw")]))
        assert_writes_on(vm)
        wait_slow(vm, "slow", 200.0)
        with pytest.raises(StillframeError, match=r"slow-disk.*slow.*--max-drain"):
            api.take(str(vm.qmp_path), tmp_path / "x.still", max_drain_ms=100).wait(60)
        assert vm.is_progressing()
        assert nodes_of_ours(vm) == []
        taken = api.take(str(vm.qmp_path), tmp_path / "x.still", max_drain_ms=10000).wait(60)
        assert taken.statistics.downtime.drain_ms > 20
    finally:
        server.kill()
        server.wait()
