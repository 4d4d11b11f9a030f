"""What others do to a VM, or what hangs in it, must not make a take harm its guest."""

from __future__ import annotations

import gc
import json
import os
import resource
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

from stillframe import api
from stillframe.errors import BusyError, HostError, MachineError, RefusedError, SnapshotFailed
from stillframe.kernel.proc_maps import read_maps
from stillframe.machine import Mode, Moment
from stillframe.machine.finding import connect
from stillframe.machine.process import stuck_io
from stillframe.machine.process.resume import process_alive, start_time
from stillframe.machine.qemu import disk_requests
from stillframe.machine.qemu import preflight as qemu_preflight
from stillframe.machine.qemu.machine import QemuMachine
from stillframe.qmp.client import QmpClient
from stillframe.qmp.replies import as_list
from stillframe.store.backends.local import LocalSink
from tests.support.bare_vm import BareVm
from tests.support.newer_qemu import require_newer_qemu
from tests.support.probes import has_uffd_wp
from tests.support.run_states import state_of, wait_state
from tests.support.waiting import wait_until

pytestmark = pytest.mark.qemu

SMALL = ("-nodefaults", "-m", "64")


@pytest.fixture(autouse=True)
def _kernel() -> None:
    has_uffd_wp().require()


@pytest.fixture(params=["stock", "newer"])
def qemu(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """Which QEMU the test's VMs are."""
    if request.param == "newer":
        monkeypatch.setenv("STILLFRAME_QEMU", require_newer_qemu())


def slow_disk(latency_s: float) -> list[str]:
    disk = {
        "driver": "null-co",
        "node-name": "slow",
        "read-zeroes": True,
        "size": 64 << 20,
        "latency-ns": int(latency_s * 1e9),
    }
    return ["-blockdev", json.dumps(disk)]


SLOW = "drive=slow,cyls=100,heads=16,secs=63"  # else QEMU reads it, to guess them
DISKS = {
    "ide": ["-M", "pc", "-device", f"ide-hd,{SLOW}"],
    "ahci": ["-M", "q35", "-device", f"ide-hd,{SLOW},id=named"],
    "virtio-blk": ["-M", "q35", "-device", f"virtio-blk-pci,{SLOW}"],
    "virtio-scsi": [
        "-M",
        "pc",
        "-device",
        "virtio-scsi-pci",
        "-device",
        f"scsi-hd,{SLOW}",
    ],
}


def wait_for_request(vm: BareVm) -> None:
    """Until the BIOS waits for its disk, however long a busy host takes to get it there."""
    with QmpClient.connect(vm.second_qmp, timeout_s=60) as qmp:
        disks = [
            disk_requests._Disk(qmp, entry)
            for entry in as_list(qmp.execute("query-block"))
            if disk_requests._in_use(entry)
        ]

        def look() -> stuck_io.Pending:
            return disk_requests._of_virtio(qmp, disks) | disk_requests._of_ide(qmp, disks)

        wait_until(lambda: stuck_io.stuck(look), "the BIOS does not read its disk")


@pytest.mark.parametrize("bus", DISKS)
def test_a_stuck_disk_request_is_refused_by_name(qemu: None, bus: str, tmp_path: Path) -> None:
    """The BIOS reads the boot sector, for a minute."""
    with BareVm(*SMALL, *slow_disk(60), *DISKS[bus]) as vm:
        wait_for_request(vm)
        began = time.monotonic()
        with pytest.raises(RefusedError, match="stuck-disk-request") as refused:
            api.take(vm.qmp, tmp_path / "a.still").wait(60)
        assert time.monotonic() - began < 40, "it waited for the disk"
        assert "slow" in str(refused.value)
        with QmpClient.connect(vm.second_qmp, timeout_s=30) as qmp:
            assert state_of(qmp) == "running"


def test_a_request_that_ends_soon_is_waited_for(tmp_path: Path) -> None:
    with BareVm(*SMALL, *slow_disk(1), *DISKS["virtio-blk"]) as vm:
        time.sleep(2)
        api.take(vm.qmp, tmp_path / "a.still", max_drain_ms=5000).wait(60)


def test_a_stop_that_hangs_names_what_it_waits_for(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The request that was not seen before: the guest goes on by itself once it is answered."""
    monkeypatch.setattr("stillframe.machine.process.machine._STOP_TIMEOUT_S", 1.0)
    monkeypatch.setattr(qemu_preflight, "CHECKS", dict.fromkeys(qemu_preflight.CHECKS, ()))
    with BareVm(*SMALL, *slow_disk(15), *DISKS["virtio-blk"]) as vm:
        wait_for_request(vm)
        with pytest.raises(MachineError, match="has not stopped") as hung:
            api.take(vm.qmp, tmp_path / "a.still").wait(60)
        assert "cont" not in str(hung.value)
        assert hung.value.guest_state == "paused"
        with QmpClient.connect(vm.second_qmp, timeout_s=60) as qmp:
            wait_state(qmp, "running")


def test_what_makes_progress_is_not_stuck(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(stuck_io, "_PATIENCE_S", 0.2)
    steps = iter(range(1000))
    assert stuck_io.stuck(lambda: {("disk", next(steps))}) == []
    assert stuck_io.stuck(lambda: {("disk", 1), ("other", next(steps))}) == ["disk"]
    # Another request to the same disk that makes progress hides none.
    assert stuck_io.stuck(lambda: {("disk", 1), ("disk", ("new", next(steps)))}) == ["disk"]
    assert stuck_io.stuck(set) == []


@contextmanager
def at_moment(monkeypatch: pytest.MonkeyPatch, moment: Moment, act: Callable[[], object]) -> Any:
    """Something happens just before the pre-flight is asked for the ``moment``'th time."""
    look = QemuMachine.preflight
    done: list[object] = []

    def act_and_look(machine: QemuMachine, mode: Mode, asked: Moment = "first") -> Any:
        if asked == moment and not done:
            done.append(act())
        return look(machine, mode, asked)

    monkeypatch.setattr(QemuMachine, "preflight", act_and_look)
    yield
    assert done


@pytest.mark.parametrize(
    ("kind", "moment"),
    [("pci-serial-2x", "first"), ("pci-serial-2x", "stop"), ("vmbus-bridge", "first")],
)
def test_a_device_whose_save_kills_qemu(
    qemu: None, kind: str, moment: Moment, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """There from the start, or plugged in while RAM was armed."""
    there = ["-device", kind] if moment == "first" else []
    with (
        BareVm(*SMALL, "-M", "pc", *there) as vm,
        QmpClient.connect(vm.second_qmp, timeout_s=30) as qmp,
    ):

        def plug() -> None:
            if not there:
                qmp.execute("device_add", {"driver": kind, "id": "late"})

        with (
            at_moment(monkeypatch, moment, plug),
            pytest.raises(RefusedError, match=f"unsavable-device.*{kind}"),
        ):
            api.take(vm.qmp, tmp_path / "a.still").wait(60)
        assert state_of(qmp) == "running"


def test_a_dump_is_waited_for_or_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """While one runs QEMU stops, but does not continue."""
    pipe = tmp_path / "dump"
    os.mkfifo(pipe)
    with BareVm("-m", "256") as vm, QmpClient.connect(vm.second_qmp, timeout_s=30) as qmp:
        reader = os.open(pipe, os.O_RDONLY | os.O_NONBLOCK)  # it does not end before it is read

        def dump() -> None:
            arguments = {"paging": False, "protocol": f"file:{pipe}", "detach": True}
            qmp.execute("dump-guest-memory", arguments)

        with at_moment(monkeypatch, "stop", dump), pytest.raises(BusyError, match="dump-running"):
            api.take(vm.qmp, tmp_path / "a.still").wait(60)
        os.set_blocking(reader, True)
        while os.read(reader, 1 << 20):
            pass
        os.close(reader)
        wait_state(qmp, "running")


def test_a_writer_that_appears_while_ram_is_saved(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A process that maps the guest's RAM too, only after the pre-flight."""
    ram = Path(f"/dev/shm/stillframe-test-{os.getpid()}")
    code = "import mmap, sys; f = open(sys.argv[1], 'r+b'); m = mmap.mmap(f.fileno(), 0); print()"
    backend = f"memory-backend-file,id=m,size=64M,mem-path={ram},share=on"
    others: list[subprocess.Popen[bytes]] = []

    def map_it() -> None:
        others.append(
            subprocess.Popen(
                [sys.executable, "-uc", f"{code}; input()", str(ram)],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
            )
        )
        assert others[0].stdout is not None
        others[0].stdout.readline()

    try:
        with BareVm("-M", "pc,memory-backend=m", "-object", backend, "-m", "64M") as vm:
            with (
                at_moment(monkeypatch, "saved", map_it),
                pytest.raises(SnapshotFailed, match="second-mapper appeared"),
            ):
                api.take(vm.qmp, tmp_path / "a.still").wait(60)
            assert not (tmp_path / "a.still").exists()
            with QmpClient.connect(vm.second_qmp, timeout_s=30) as qmp:
                assert state_of(qmp) == "running"
    finally:
        ram.unlink(missing_ok=True)
        for other in others:
            other.kill()
            other.wait()


@contextmanager
def no_free_descriptor() -> Iterator[None]:
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (max(map(int, os.listdir("/proc/self/fd"))), hard))
    taken: list[int] = []
    try:
        while True:
            try:
                taken.append(os.dup(0))
            except OSError:
                break
        yield
    finally:
        for fd in taken:
            os.close(fd)
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))


def test_without_a_free_descriptor_the_vm_is_not_said_to_be_gone(tmp_path: Path) -> None:
    with BareVm(*SMALL) as vm:
        started = start_time(vm.pid)
        api.take(vm.qmp, tmp_path / "before.still").wait(60)  # all modules are imported then
        sink = LocalSink(tmp_path / "a.still")
        with connect(vm.qmp) as machine, no_free_descriptor():
            assert process_alive(vm.pid, started)
            with pytest.raises(HostError, match="ulimit") as few:
                read_maps(vm.pid)
            assert few.value.guest_state == "running"
            with pytest.raises(HostError):
                connect(vm.second_qmp)
            with pytest.raises(HostError) as failed:
                api.take(machine, sink).wait(60)
            assert failed.value.guest_state == "running"
    assert not process_alive(vm.pid, started)


def test_the_device_state_is_given_up_with_a_dead_monitor() -> None:
    with BareVm(*SMALL) as vm:
        gc.collect()  # nor do the tests before have any that are closed meanwhile
        before = len(os.listdir("/proc/self/fd"))
        machine = connect(vm.qmp)
        machine.prepare_device_state()
        vm.process.kill()
        vm.process.wait()
        wait_until(lambda: not machine.qmp.alive)
        machine.close()
        assert len(os.listdir("/proc/self/fd")) == before


def test_descriptors_beyond_what_select_takes(tmp_path: Path) -> None:
    """A program with more than 1024 open files takes a snapshot."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    if hard < 4096:
        pytest.skip("missing many-files: the limit on open files is below 4096")
    resource.setrlimit(resource.RLIMIT_NOFILE, (4096, hard))
    fds = [os.dup(0) for _ in range(1100)]
    try:
        with BareVm(*SMALL) as vm:
            api.take(vm.qmp, tmp_path / "a.still").wait(60)
    finally:
        for fd in fds:
            os.close(fd)
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))
