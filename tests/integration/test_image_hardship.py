"""Images where memory, disk or luck is short: an error that says so, or a guest that waits; never
wrong content, and nothing left behind."""

from __future__ import annotations

import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest

from guests.qemu import GuestVm
from stillframe import api
from stillframe.errors import MachineError, NotFoundError
from stillframe.image import filler
from stillframe.image.filling import Filling
from stillframe.restore.restored import RestoredVm, list_restored
from tests.integration.cli.program import run
from tests.support.image_killing import (
    emulators,
    filler_processes,
    kill_clones,
    kill_filler,
    kill_restorers,
    wait_until,
)
from tests.support.image_vm import ImageVms, image_vms, ram_differences
from tests.support.memory_cgroup import MemoryCgroup
from tests.support.probes import has_linux_guest, has_uffd_wp
from tests.support.small_file_system import mounted_tmpfs
from tests.support.taking import take

pytestmark = pytest.mark.qemu

MIB = 1 << 20
FILL_S = 60.0
_ADOPT = (
    "import sys; from pathlib import Path; from stillframe.image.filling import Filling;"
    " Filling.adopt(Path(sys.argv[1])).wait()"
)


_FORK = """
import sys
from pathlib import Path
from stillframe import api
from stillframe.restore.live_fork import LiveFork
limit, usage = map(Path, sys.argv[2:])
begin = LiveFork.begin
def at_the_instant(self, *arguments):
    limit.write_text(str(int(usage.read_text()) + (8 << 20)))
    begin(self, *arguments)
LiveFork.begin = at_the_instant
api.fork(int(sys.argv[1]), 2)
"""
"""A fork whose memory cgroup has 8 MiB left from the instant on."""


_KILLED_WHEN_IT_RUNS = """
import os, signal, sys
from stillframe import api
from stillframe.restore import start
load = start.start_clones
def killed(*arguments, **options):
    load(*arguments, **options)
    os.kill(os.getpid(), signal.SIGKILL)
start.start_clones = killed
api.restore(sys.argv[1], paused=True)
"""


@pytest.fixture(scope="module")
def snapshot(tmp_path_factory: pytest.TempPathFactory) -> Path:
    has_linux_guest().require()
    has_uffd_wp().require()
    file = tmp_path_factory.mktemp("snapshot") / "x.still"
    with GuestVm("linux", ram_mib=192, populate_mib=64, name="origin").start() as vm:
        take(vm, file)
    return file


@pytest.fixture
def vms(snapshot: Path, tmp_path: Path) -> Iterator[ImageVms]:
    with image_vms(snapshot, tmp_path / "vms") as found:
        yield found


@pytest.fixture
def runtime(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """Where the VMs' directories go; what is left is ended after the test."""
    monkeypatch.setenv("XDG_RUNTIME_DIR", str(tmp_path))
    tmp_path.chmod(0o700)
    yield tmp_path
    for vm in list_restored():
        if vm.directory.startswith(str(tmp_path)):  # not another test run's domains
            vm.kill()
    for pid in emulators(tmp_path):  # that nobody knows: the test has failed
        os.kill(pid, signal.SIGKILL)


@pytest.fixture
def small_memory(tmp_path: Path) -> Iterator[Path]:
    """Shared memory of 32 MiB."""
    with mounted_tmpfs(tmp_path / "shm", "size=32m") as place:
        yield place


@pytest.fixture
def cgroup() -> Iterator[MemoryCgroup]:
    made = MemoryCgroup()
    yield made
    made.remove()


def restored_without_filler(file: Path) -> RestoredVm:
    """A VM whose fillers were killed before they were through."""
    for _ in range(20):
        vm = api.restore(file, paused=True)
        for pid in filler_processes(vm.image_path):
            kill_filler(pid)
        if Path(vm.image_path or "").exists():
            return vm
        vm.kill()
    pytest.fail("no filler could be killed before it was through")


def test_no_room_in_shared_memory(vms: ImageVms, small_memory: Path) -> None:
    """The guest waits until there is room; then all of RAM is right."""

    def make_file(number: int) -> int:
        return os.open(small_memory / str(number), os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)

    filling = vms.start(paused=True, working_set=False, make_file=make_file)
    wait_until(lambda: "no room in memory" in (filling.progress().trouble or ""))
    seen: list[object] = []
    before = filling.progress().faults
    reader = threading.Thread(target=lambda: seen.append(vms.differences()), daemon=True)
    reader.start()
    wait_until(lambda: filling.progress().faults > before)
    assert not filling.wait(0.2)
    assert seen == []
    subprocess.run(["mount", "-o", "remount,size=512m", str(small_memory)], check=True)
    assert filling.wait(FILL_S)
    reader.join(FILL_S)
    assert seen == [[]]


def test_a_snapshot_that_was_removed(snapshot: Path, runtime: Path) -> None:
    """``ps`` says so, the guest waits, and goes on once the file is back."""
    copy = runtime / "copy.still"
    shutil.copyfile(snapshot, copy)
    vm = restored_without_filler(copy)
    copy.unlink()
    shown = {one["pid"]: one for one in json.loads(run("ps", "--json").stdout)}[vm.pid]
    assert any("image is not being filled" in reason for reason in shown["reasons"])
    assert 0 <= shown["resident"] < 1
    with pytest.raises(NotFoundError):
        vm.wait_resident(FILL_S)
    assert vm.is_running
    shutil.copyfile(snapshot, copy)
    assert run("ps").returncode == 0
    wait_until(lambda: not Path(vm.image_path or "").exists())
    assert ram_differences(vm.pid, Path(vm.qmp_address), snapshot) == []


def test_a_snapshot_that_is_removed_while_it_is_read(vms: ImageVms, tmp_path: Path) -> None:
    """Whoever fills has it open."""
    copy = tmp_path / "copy.still"
    shutil.copyfile(vms.file, copy)
    with image_vms(copy, tmp_path / "of-copy") as clones:
        filling = clones.start(paused=True, working_set=False)
        copy.unlink()
        assert filling.wait(FILL_S)
        shutil.copyfile(vms.file, copy)  # to compare with
        assert clones.differences() == []


def test_a_forwarded_port_that_is_taken(snapshot: Path, runtime: Path) -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        forward = f"user,id=n,hostfwd=tcp:127.0.0.1:{taken.getsockname()[1]}-:22"
        with pytest.raises(MachineError, match="host forwarding"):
            api.restore(snapshot, extra_args=["-netdev", forward])
    assert emulators(runtime) == []
    assert not list((runtime / "stillframe").iterdir())


def test_a_filler_whose_cgroup_is_full(
    vms: ImageVms, cgroup: MemoryCgroup, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It is killed, or gets no memory; the guest waits, and somebody else goes on."""
    with monkeypatch.context() as patch:
        patch.setattr(filler, "_MOST_WORKERS", 0)
        vms.start(paused=True, working_set=False).close()
    cgroup.leave(56 * MIB)
    script = f'echo 0 > {cgroup.path}/cgroup.procs; exec "$@"'
    words = ["sh", "-c", script, "sh", sys.executable, "-c", _ADOPT, str(vms.record_path)]
    process = subprocess.Popen(words, stderr=subprocess.DEVNULL)
    try:
        process.wait(30)
    except subprocess.TimeoutExpired:
        process.kill()
        process.wait()
    assert process.returncode != 0
    assert vms.record_path.exists()
    assert Filling.adopt(vms.record_path).wait(FILL_S)
    assert vms.differences() == []


def test_a_clone_whose_cgroup_is_full(vms: ImageVms, cgroup: MemoryCgroup) -> None:
    """It is killed for what it writes; the other one has all of its RAM."""
    filling = vms.start(2, working_set=False)
    first, second = vms.started
    cgroup.leave(MIB)
    cgroup.add(first.pid)
    wait_until(
        lambda: Path(f"/proc/{first.pid}/stat").read_text().rpartition(")")[2].split()[0] == "Z"
    )
    assert filling.wait(FILL_S)
    console = vms.console(1)
    try:
        assert console.is_progressing()
        assert console.command("audit").startswith("audit ok ")
    finally:
        console.close()
    assert second.state == "running"


def test_a_restore_whose_cgroup_is_full(
    snapshot: Path, runtime: Path, cgroup: MemoryCgroup
) -> None:
    cgroup.leave(40 * MIB)
    script = f'echo 0 > {cgroup.path}/cgroup.procs; exec "$@"'
    words = [sys.executable, "-m", "stillframe", "restore", str(snapshot), "--wait", "--paused"]
    done = subprocess.run(["sh", "-c", script, "sh", *words], capture_output=True, check=False)
    assert done.returncode != 0
    assert b"Traceback" not in done.stderr
    for vm in list_restored():  # the restoring process was the one that was killed
        vm.kill()
    wait_until(lambda: emulators(runtime) == [])


def test_a_fork_of_a_running_vm_whose_cgroup_is_full(
    runtime: Path, cgroup: MemoryCgroup, tmp_path: Path
) -> None:
    """Its clones end with it; the VM that is forked does not notice."""
    has_linux_guest().require()
    has_uffd_wp().require()
    script = f'echo 0 > {cgroup.path}/cgroup.procs; exec "$@"'
    with GuestVm("linux", ram_mib=192, populate_mib=64, name="origin").start() as vm:
        limits = (cgroup.path / cgroup.limit_name, cgroup.path / cgroup.usage_name)
        words = [sys.executable, "-c", _FORK, *map(str, (vm.pid, *limits))]
        done = subprocess.run(
            ["sh", "-c", script, "sh", *words], capture_output=True, timeout=120, check=False
        )
        assert done.returncode != 0, done
        wait_until(lambda: emulators(runtime) == [])
        assert list_restored() == []
        assert vm.is_progressing()
        assert vm.console.command("audit").startswith("audit ok ")
        take(vm, tmp_path / "next.still")
        clone = api.fork(vm.pid, 1)[0]
        assert clone.wait_resident(FILL_S)
        clone.kill()


def test_who_restores_is_killed(snapshot: Path, runtime: Path) -> None:
    killed, _ = kill_restorers(snapshot, kills=4, seed=6, runtime=runtime)
    assert killed >= 4
    api.restore(snapshot, paused=True).kill()  # sweeps what they left
    assert not list((runtime / "stillframe").iterdir())


def test_who_restores_on_a_complete_image_is_killed(
    snapshot: Path, runtime: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Once the VM has its state, and before anything is told of it: it runs on, and is known."""
    monkeypatch.setenv("STILLFRAME_IMAGES", str(runtime / "images"))
    made = api.add_image(snapshot)
    done = subprocess.run([sys.executable, "-c", _KILLED_WHEN_IT_RUNS, str(snapshot)], check=False)
    assert done.returncode == -signal.SIGKILL
    (pid,) = emulators(runtime)
    (vm,) = [one for one in list_restored() if one.pid == pid]
    assert vm.is_on_image
    assert ram_differences(pid, Path(vm.qmp_address), snapshot) == []
    assert [image.in_use for image in api.images()] == [True]
    vm.kill()
    assert emulators(runtime) == []
    assert not list((runtime / "stillframe").iterdir())
    assert [image.id for image in api.rm_images(made.id)] == [made.id]  # nobody holds it


def test_a_clone_is_killed(snapshot: Path, tmp_path: Path) -> None:
    kill_clones(snapshot, kills=2, seed=7, directory=tmp_path)
