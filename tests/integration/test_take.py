"""`take` on a real QEMU with a real guest: one instant, complete, and it starts again."""

from __future__ import annotations

import os
import random
import shutil
import subprocess
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from guests.qemu import GuestVm, qemu_binary
from stillframe.capture import ram_capture
from stillframe.capture.ram_capture import RamCapture
from stillframe.errors import BusyError, RefusedError, SnapshotCancelled, SnapshotFailed
from stillframe.machine import Mode, Moment
from stillframe.machine.finding import connect
from stillframe.machine.qemu.machine import QemuMachine
from stillframe.qmp.command import Command
from stillframe.snapshot import take as taking_module
from stillframe.snapshot.job import SnapshotJob
from stillframe.snapshot.options import SnapshotOptions
from stillframe.snapshot.take import take_snapshot
from stillframe.store import open_snapshot
from stillframe.store.backends.local import LocalSink
from tests.support.probes import has_uffd_wp
from tests.support.taking import consistency, ram_block, take

pytestmark = pytest.mark.qemu

GuestFactory = Callable[..., GuestVm]
FULL_LOAD = {"rate_mib_per_s": 0, "mem_mib": 96, "ram_mib": 256}
MOMENTS = 4


@pytest.fixture(autouse=True)
def _kernel() -> None:
    has_uffd_wp().require()


def check_moments(vm: GuestVm, directory: Path, moments: int, **options: Any) -> None:
    """Snapshots at random moments; none may be torn."""
    chance = random.Random(vm.pid)
    for number in range(moments):
        time.sleep(chance.uniform(0, 0.2))
        file = directory / f"{number}.still"
        take(vm, file, **options)
        report = consistency(vm, file)
        assert report.consistent, str(report)
        file.unlink()
    assert vm.command("audit").startswith("audit ok")


@pytest.mark.parametrize("memory", ["private", "memfd", "shm", "hugetlb"])
def test_never_torn_under_full_load(linux_guest: GuestFactory, tmp_path: Path, memory: str) -> None:
    check_moments(linux_guest(memory=memory, **FULL_LOAD), tmp_path, MOMENTS)


@pytest.mark.parametrize("memory", ["private", "memfd"])
def test_never_torn_under_kvm(multiboot_guest: GuestFactory, tmp_path: Path, memory: str) -> None:
    vm = multiboot_guest(accelerator="kvm", memory=memory, rate_mib_per_s=0, mem_mib=48, ram_mib=96)
    check_moments(vm, tmp_path, MOMENTS)


@pytest.mark.parametrize(
    "options",
    [
        {"arm": False},
        {"mode": "stop"},
        {"spill_bytes": 4 << 20},
        {"compression_level": None},
        {"workers": 1},
    ],
    ids=str,
)
def test_never_torn_with(
    linux_guest: GuestFactory, tmp_path: Path, options: dict[str, Any]
) -> None:
    check_moments(linux_guest(**FULL_LOAD), tmp_path, 2, **options)


def test_a_full_spill_does_not_keep_the_guest_waiting_for_the_monitor(
    linux_guest: GuestFactory, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """After ``cont`` the monitor is asked: by then somebody must make room, as a vCPU that waits
    for it may hold the lock that the monitor needs."""
    vm = linux_guest(**FULL_LOAD)
    check = taking_module.check_instant
    progressing: list[bool] = []

    def wait_and_check(*arguments: Any) -> None:
        time.sleep(1)  # the guest overwrites far more than the spill holds
        progressing.append(vm.is_progressing())
        check(*arguments)

    monkeypatch.setattr(taking_module, "check_instant", wait_and_check)
    take(vm, tmp_path / "a.still", spill_bytes=4 << 20)
    assert progressing == [True]
    assert consistency(vm, tmp_path / "a.still").consistent


def test_without_protection_the_check_fails(
    linux_guest: GuestFactory, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The control: pages that are un-protected without a copy must be found torn."""
    vm = linux_guest(**FULL_LOAD)
    core = ram_capture._capture
    monkeypatch.setattr(core, "PHASE_ACTIVE", core.PHASE_RELEASE)
    file = tmp_path / "a.still"
    for _ in range(20):  # on a busy host the sweep may be over before the guest goes on
        take(vm, file)
        if not consistency(vm, file).consistent:
            return
        file.unlink()
    pytest.fail("no snapshot was torn")


def test_numbers_add_up(linux_guest: GuestFactory, tmp_path: Path) -> None:
    vm = linux_guest(ram_mib=384, mem_mib=32, populate_mib=64)
    file = tmp_path / "a.still"
    taken = take(vm, file)
    numbers = taken.statistics
    assert numbers.state == "completed"
    assert numbers.pages.total * 4096 == numbers.ram_bytes
    assert numbers.pages.total == numbers.pages.zero + numbers.pages.data
    assert 0 < numbers.pages.never_populated <= numbers.pages.zero
    assert numbers.pages.data * 4096 > 64 << 20
    assert numbers.file_bytes == file.stat().st_size
    assert numbers.downtime_ms == pytest.approx(numbers.downtime.total_ms)
    assert file.stat().st_mode & 0o777 == 0o600
    with open_snapshot(file) as snapshot:
        assert snapshot.id == taken.id
        assert snapshot.manifest.machine is not None
        assert snapshot.manifest.machine.machine_type.startswith("pc-q35-")
        snapshot.verify()


def test_nothing_is_written_while_the_guest_stands(
    linux_guest: GuestFactory, tmp_path: Path
) -> None:
    """What the guest wrote before the stop must not count as written by the VMM after it."""
    vm = linux_guest(**FULL_LOAD)
    for number in range(3):
        assert take(vm, tmp_path / f"{number}.still").statistics.writes_while_stopped == ()


def test_never_populated_pages_stay_so(linux_guest: GuestFactory, tmp_path: Path) -> None:
    vm = linux_guest(ram_mib=1024, mem_mib=16, memory="private")

    def resident_kib() -> int:
        text = Path(f"/proc/{vm.pid}/status").read_text()
        return int(text.split("VmRSS:")[1].split()[0])

    before = resident_kib()
    taken = take(vm, tmp_path / "a.still")
    assert taken.statistics.pages.never_populated * 4 > 512 << 10
    assert resident_kib() - before < 32 << 10


def test_starts_again_in_plain_qemu(linux_guest: GuestFactory, tmp_path: Path) -> None:
    """The promise of no lock-in: zstd and QEMU alone start it, without a warning."""
    if shutil.which("zstd") is None:
        pytest.skip("missing zstd: no program zstd")
    vm = linux_guest(**FULL_LOAD)
    file = tmp_path / "a.still"
    take(vm, file)
    again = GuestVm(
        "linux",
        **FULL_LOAD,
        extra=["-incoming", f"exec:{shutil.which('zstd')} -dc {file}"],
        directory=tmp_path,
        binary=qemu_binary(),
    )
    with again.start(wait_ready=False):
        tick = again.wait_tick()
        assert tick.passes > 0
        assert again.command("audit").startswith("audit ok")
        assert vm.is_progressing()
        assert again.log_path.read_text() == ""


def test_restored_guest_is_at_the_instant(linux_guest: GuestFactory, tmp_path: Path) -> None:
    """What the snapshot holds for the guest's pages is what the restored guest finds."""
    vm = linux_guest(**(FULL_LOAD | {"rate_mib_per_s": 20}))
    file = tmp_path / "a.still"
    take(vm, file)
    report = consistency(vm, file)
    with open_snapshot(file) as snapshot:
        total = sum(page is not None for _, page in snapshot.iter_pages(ram_block(vm)))
    assert total > report.pages
    assert report.consistent


def test_a_second_snapshot_at_the_same_time_is_refused(
    linux_guest: GuestFactory, tmp_path: Path
) -> None:
    vm = linux_guest(extra=["-qmp", f"unix:{tmp_path}/second.sock,server=on,wait=off"])
    with (
        connect(str(vm.qmp_path)) as one,
        connect(f"{tmp_path}/second.sock") as two,
    ):
        slow = SnapshotOptions(max_bandwidth_bytes_per_s=1 << 20)
        first = SnapshotJob(
            lambda control: take_snapshot(control, one, LocalSink(tmp_path / "1.still"), slow)
        )
        while first.state not in ("active", "failed"):
            time.sleep(0.01)
        second = SnapshotJob(
            lambda control: take_snapshot(control, two, LocalSink(tmp_path / "2.still"), slow)
        )
        with pytest.raises(BusyError, match="another snapshot"):
            second.wait(60)
        first.cancel()
        with pytest.raises(SnapshotCancelled):
            first.wait(60)
    assert vm.is_progressing()
    assert not list(tmp_path.glob("*.still"))


def test_a_paused_vm_stays_paused(linux_guest: GuestFactory, tmp_path: Path) -> None:
    vm = linux_guest()
    with connect(str(vm.qmp_path)) as machine:
        machine.stop()
        job = SnapshotJob(
            lambda control: take_snapshot(
                control, machine, LocalSink(tmp_path / "a.still"), SnapshotOptions()
            )
        )
        job.wait(60)
        assert machine.status() == "paused"
        machine.cont()
    assert vm.is_progressing()


def test_cat_of_the_stream_is_what_zstd_gives(linux_guest: GuestFactory, tmp_path: Path) -> None:
    if shutil.which("zstd") is None:
        pytest.skip("missing zstd: no program zstd")
    vm = linux_guest()
    file = tmp_path / "a.still"
    take(vm, file)
    plain = subprocess.run(
        ["zstd", "-dc", str(file)], stdout=subprocess.PIPE, check=True, timeout=60
    ).stdout
    with open_snapshot(file) as snapshot:
        assert b"".join(snapshot.iter_stream()) == plain


def test_a_device_that_cannot_be_saved_is_refused(
    linux_guest: GuestFactory, tmp_path: Path
) -> None:
    """QEMU 7.2 dies when it is told to save an nvme disk's state; so it must not be told."""
    vm = linux_guest(
        extra=[
            "-device",
            "nvme,serial=1,drive=d",
            "-drive",
            "if=none,id=d,file=null-co://,format=raw",
        ]
    )
    with pytest.raises(RefusedError, match="migration-blocker"):
        take(vm, tmp_path / "a.still")
    assert vm.is_progressing()


def test_such_a_device_plugged_in_after_the_preflight(
    linux_guest: GuestFactory, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The first look saw nothing; the one right before the stop does."""
    look = QemuMachine.preflight
    monkeypatch.setattr(
        QemuMachine,
        "preflight",
        lambda machine, mode, moment="first": look(machine, mode, moment) * (moment == "stop"),
    )
    vm = linux_guest(
        extra=[
            "-device",
            "nvme,serial=1,drive=d",
            "-drive",
            "if=none,id=d,file=null-co://,format=raw",
        ]
    )
    with pytest.raises(RefusedError, match="migration-blocker"):
        take(vm, tmp_path / "a.still")
    assert vm.is_progressing()


def test_mode_stop_looks_for_populated_pages_when_the_guest_stands(
    linux_guest: GuestFactory, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A page that is touched between the look and the stop would be written as zeros."""
    vm = linux_guest(extra=["-qmp", f"unix:{tmp_path}/second.sock,server=on,wait=off"])
    looked_at: list[str] = []
    learn = RamCapture.learn_population
    with connect(f"{tmp_path}/second.sock") as other:

        def learn_and_note(ram: RamCapture) -> None:
            looked_at.append(other.status())
            learn(ram)

        monkeypatch.setattr(RamCapture, "learn_population", learn_and_note)
        take(vm, tmp_path / "a.still", mode="stop")
    assert looked_at == ["paused"]


def test_what_grows_with_ram_is_done_while_the_guest_runs(
    linux_guest: GuestFactory, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    vm = linux_guest(extra=["-qmp", f"unix:{tmp_path}/second.sock,server=on,wait=off"])
    seen: dict[str, list[str]] = {}
    with connect(f"{tmp_path}/second.sock") as other:

        def watch(owner: object, name: str) -> None:
            real = getattr(owner, name)

            def note(*arguments: object) -> object:
                seen.setdefault(name, []).append(other.status())
                return real(*arguments)

            monkeypatch.setattr(owner, name, note)

        for name in ("_protect_all", "learn_population", "register"):
            watch(RamCapture, name)
        watch(os, "fsync")
        take(vm, tmp_path / "a.still")
    assert seen.keys() == {"_protect_all", "learn_population", "register", "fsync"}
    assert {status for statuses in seen.values() for status in statuses} == {"running"}


@pytest.mark.parametrize("mode", ["background", "stop"])
def test_a_guest_that_somebody_resumes_meanwhile_fails_the_snapshot(
    linux_guest: GuestFactory, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, mode: str
) -> None:
    vm = linux_guest(extra=["-qmp", f"unix:{tmp_path}/second.sock,server=on,wait=off"])
    save = QemuMachine.save_device_state
    with connect(f"{tmp_path}/second.sock") as other:

        def resume_and_save(machine: QemuMachine, then: Command | None = None) -> bytes:
            other.cont()
            return save(machine, then)

        monkeypatch.setattr(QemuMachine, "save_device_state", resume_and_save)
        with pytest.raises(SnapshotFailed, match="RESUME") as failure:
            take(vm, tmp_path / "a.still", mode=mode)
    assert failure.value.guest_state == "running"
    assert vm.is_progressing()
    assert not list(tmp_path.glob("*.still"))


def test_the_state_of_a_paused_vm_is_told(linux_guest: GuestFactory, tmp_path: Path) -> None:
    vm = linux_guest()
    with connect(str(vm.qmp_path)) as machine:
        machine.stop()
        job = SnapshotJob(
            lambda control: take_snapshot(
                control,
                machine,
                LocalSink(tmp_path / "a.still"),
                SnapshotOptions(max_bandwidth_bytes_per_s=1 << 20),
            )
        )
        while job.state not in ("active", "failed"):
            time.sleep(0.01)
        job.cancel()
        with pytest.raises(SnapshotCancelled) as cancelled:
            job.wait(60)
    assert cancelled.value.guest_state == "paused"


def test_a_paused_vm_that_somebody_resumes_is_not_left_stopped(
    linux_guest: GuestFactory, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It is resumed right after it was found paused: our stop must be undone."""
    vm = linux_guest(extra=["-qmp", f"unix:{tmp_path}/second.sock,server=on,wait=off"])
    ask, look = QemuMachine.status, QemuMachine.preflight
    with connect(f"{tmp_path}/second.sock") as other:
        other.stop()
        resumed: list[bool] = []

        def look_and_arm(machine: QemuMachine, mode: Mode, moment: Moment = "first") -> Any:
            found = look(machine, mode, moment)
            if moment == "stop":
                monkeypatch.setattr(QemuMachine, "status", status_and_resume)
            return found

        def status_and_resume(machine: QemuMachine) -> str:
            found = ask(machine)
            if not resumed:
                resumed.append(True)
                other.cont()
            return found

        monkeypatch.setattr(QemuMachine, "preflight", look_and_arm)
        with pytest.raises(SnapshotFailed, match="RESUME"):
            take(vm, tmp_path / "a.still")
    assert resumed
    assert vm.is_progressing()


@pytest.mark.parametrize("step", ["save_device_state", "cont"])
def test_a_reset_in_the_downtime_fails_the_snapshot(
    linux_guest: GuestFactory, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, step: str
) -> None:
    """It would show RAM from before it with devices from after it, or the other way round."""
    vm = linux_guest(extra=["-qmp", f"unix:{tmp_path}/second.sock,server=on,wait=off"])
    own = getattr(QemuMachine, step)
    with connect(f"{tmp_path}/second.sock") as other:
        resets: list[object] = []

        def reset_and_go_on(machine: QemuMachine, *arguments: object) -> object:
            if not resets:
                resets.append(other.qmp.execute("system_reset"))
            return own(machine, *arguments)

        monkeypatch.setattr(QemuMachine, step, reset_and_go_on)
        with pytest.raises(SnapshotFailed, match="RESET") as failure:
            take(vm, tmp_path / "a.still")
        assert failure.value.guest_state == "running"
        assert other.status() == "running"
    assert not list(tmp_path.glob("*.still"))
