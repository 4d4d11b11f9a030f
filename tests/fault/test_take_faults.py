"""What can go wrong around a snapshot: a clear error, the right exit code, the guest unharmed."""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from guests.qemu import GuestVm
from stillframe.errors import MachineError
from stillframe.machine import finding as running
from stillframe.machine.finding import connect
from stillframe.snapshot.job import SnapshotJob
from stillframe.snapshot.options import SnapshotOptions
from stillframe.snapshot.take import take_snapshot
from stillframe.store.backends.local import LocalSink
from tests.support.probes import has_uffd_wp
from tests.support.small_file_system import mounted_tmpfs
from tests.support.taking import (
    REPOSITORY,
    assert_unharmed,
    command,
    consistency,
    finish,
    start_take,
    take,
)

pytestmark = [pytest.mark.qemu]

GuestFactory = Callable[..., GuestVm]
SLOW = ("--max-bandwidth", "1M")


@pytest.fixture(autouse=True)
def _kernel() -> None:
    has_uffd_wp().require()


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A file system of 4 MiB."""
    with mounted_tmpfs(tmp_path / "small", "size=4m") as place:
        yield place


def wait_for_saving(process: subprocess.Popen[str], vm: GuestVm) -> None:
    """Until RAM is being saved: the snapshotter holds a userfaultfd."""
    deadline = time.monotonic() + 60
    while time.monotonic() < deadline:
        for fd in Path(f"/proc/{process.pid}/fd").iterdir():
            try:
                if "userfaultfd" in os.readlink(fd):
                    time.sleep(0.3)
                    return
            except OSError:
                continue
        time.sleep(0.01)
    raise AssertionError("the snapshotter never attached")


def test_full_disk(linux_guest: GuestFactory, tmp_path: Path, small_disk: Path) -> None:
    vm = linux_guest(populate_mib=64)
    code, reply, complaints = finish(start_take(vm, small_disk / "a.still"))
    assert code == 7
    assert reply["guest_state"] == "running"
    assert "Traceback" not in complaints
    assert os.listdir(small_disk) == []
    work = tmp_path / "work"
    work.mkdir()
    assert_unharmed(vm, work)


def test_the_vm_exits_midway(linux_guest: GuestFactory, tmp_path: Path) -> None:
    vm = linux_guest(populate_mib=64)
    process = start_take(vm, tmp_path / "a.still", *SLOW)
    wait_for_saving(process, vm)
    os.kill(vm.pid, signal.SIGKILL)
    code, reply, complaints = finish(process)
    assert code == 6
    assert reply["guest_state"] in ("none", "unknown")
    assert "Traceback" not in complaints
    assert list(tmp_path.glob("*.still")) == []


def test_cancelled_by_a_signal(linux_guest: GuestFactory, tmp_path: Path) -> None:
    vm = linux_guest(populate_mib=64)
    process = start_take(vm, tmp_path / "a.still", *SLOW)
    wait_for_saving(process, vm)
    process.send_signal(signal.SIGINT)
    code, reply, complaints = finish(process)
    assert code == 130
    assert reply["guest_state"] == "running"
    assert "Traceback" not in complaints
    assert_unharmed(vm, tmp_path)


@pytest.mark.parametrize("mode", ["background", "stop"])
def test_cancelled_while_the_destination_hangs(linux_guest: GuestFactory, mode: str) -> None:
    """Nobody reads the pipe: the guest must not wait for that."""
    vm = linux_guest(mem_mib=96, rate_mib_per_s=0, tick_ms=50)
    process = subprocess.Popen(
        [*command("take", str(vm.qmp_path), "-o", "-", "--mode", mode, "--spill", "1M")],
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
        cwd=REPOSITORY,
    )
    try:
        deadline = time.monotonic() + 60
        while vm.is_progressing(1.0):
            assert time.monotonic() < deadline, "the spill never filled: this shows nothing"
        process.send_signal(signal.SIGINT)
        assert vm.is_progressing(), "the guest waits for the pipe"
    finally:
        process.kill()
        process.communicate()
    assert vm.is_progressing()


def test_a_second_snapshotter(linux_guest: GuestFactory, tmp_path: Path) -> None:
    other = f"{tmp_path}/other.sock"
    vm = linux_guest(populate_mib=64, extra=["-qmp", f"unix:{other},server=on,wait=off"])
    first = start_take(vm, tmp_path / "a.still", *SLOW)
    wait_for_saving(first, vm)
    second = subprocess.run(
        [*first.args[:4], other, "-o", str(tmp_path / "b.still"), "--json"],  # type: ignore[index]
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )
    assert second.returncode == 4, second.stderr
    assert str(first.pid) in second.stdout
    first.send_signal(signal.SIGINT)
    assert finish(first)[0] == 130
    assert not list(tmp_path.glob("*.still"))


class Relay:
    """Stands between a client and a monitor, and can be cut at a given command."""

    def __init__(self, path: Path, monitor: Path, cut_at: bytes) -> None:
        self._server = socket.socket(socket.AF_UNIX)
        self._server.bind(str(path))
        self._server.listen()
        self._monitor = str(monitor)
        self._cut_at = cut_at
        self.cuts = 0
        self._cut: set[socket.socket] = set()
        threading.Thread(target=self._serve, daemon=True).start()

    def _serve(self) -> None:
        while True:
            client, _ = self._server.accept()
            upstream = socket.socket(socket.AF_UNIX)
            upstream.connect(self._monitor)
            threading.Thread(target=self._pump, args=(upstream, client, b""), daemon=True).start()
            threading.Thread(
                target=self._pump,
                args=(client, upstream, b"" if self.cuts else self._cut_at),
                daemon=True,
            ).start()

    def _pump(self, source: socket.socket, target: socket.socket, cut_at: bytes) -> None:
        try:
            while True:
                data, rights, _, _ = socket.recv_fds(source, 65536, 4)
                if not data:
                    break
                last = bool(cut_at) and cut_at in data
                if last:
                    self.cuts += 1  # from now on no answer of this connection gets through
                    self._cut.add(target)
                if source not in self._cut:
                    socket.send_fds(target, [data], rights)
                for fd in rights:
                    os.close(fd)
                if last:
                    break
        except OSError:
            pass
        for end in (source, target):
            try:
                end.shutdown(socket.SHUT_RDWR)
            except OSError:
                continue


@pytest.mark.parametrize("lost_at", ["stop", "xen-save-devices-state", "cont"])
def test_the_monitor_vanishes_in_the_downtime(
    linux_guest: GuestFactory,
    tmp_path: Path,
    lost_at: str,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """The command goes through, its answer never comes; the guest must go on all the same."""
    vm = linux_guest(mem_mib=32, tick_ms=50)
    relay_path = tmp_path / "relay.sock"
    relay = Relay(relay_path, vm.qmp_path, f'"execute":"{lost_at}"'.encode())
    # The relay hides which process is behind the monitor.
    monkeypatch.setattr(running, "pid_of_monitor", lambda *_: vm.pid)
    file = tmp_path / "a.still"
    with connect(str(relay_path)) as machine:
        job = SnapshotJob(
            lambda control: take_snapshot(control, machine, LocalSink(file), SnapshotOptions())
        )
        with pytest.raises(MachineError):
            job.wait(60)
    assert relay.cuts == 1
    assert vm.is_progressing()
    assert not file.exists()
    take(vm, file)
    assert consistency(vm, file).consistent
