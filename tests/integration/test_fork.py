"""Restore on an image, forks, and their end: from the API and the command line."""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import shutil
import signal
import subprocess
import time
from collections.abc import Iterator
from pathlib import Path

import msgspec
import pytest

from guests.qemu import GuestVm
from stillframe import api
from stillframe.errors import (
    BusyError,
    DataError,
    HostError,
    MachineError,
    NotFoundError,
    UsageError,
)
from stillframe.image.filling import Filling
from stillframe.restore.restored import (
    FORK_PREFIX,
    FORKS,
    RestoredVm,
    list_restored,
    write_vm,
)
from stillframe.store import open_snapshot
from tests.integration.cli.program import run
from tests.support.probes import has_linux_guest, has_uffd_wp
from tests.support.restored_vms import assert_guest_goes_on
from tests.support.taking import take

pytestmark = [pytest.mark.qemu, pytest.mark.usefixtures("places")]

RAM_MIB = 224
PAGES = 8192
FILL_S = 60.0


@pytest.fixture(scope="module")
def source() -> Iterator[GuestVm]:
    has_linux_guest().require()
    has_uffd_wp().require()
    with GuestVm("linux", ram_mib=RAM_MIB, populate_mib=64, name="origin").start() as vm:
        yield vm


@pytest.fixture(scope="module")
def snapshot(source: GuestVm) -> Path:
    file = source.directory / "x.still"
    take(source, file)
    return file


def assert_goes_on(vm: RestoredVm, after_tick: int = 0) -> None:
    assert_guest_goes_on(vm, PAGES, after_tick)


def fillers(vm: RestoredVm) -> dict[int, int]:
    """The processes that fill its image, each with its parent."""
    found = {}
    for entry in Path("/proc").glob("[0-9]*"):
        with contextlib.suppress(OSError):
            words = (entry / "cmdline").read_bytes().decode().split("\0")
            if "stillframe.image.filler_process" in words and vm.image_path in words:
                found[int(entry.name)] = int((entry / "stat").read_text().split()[3])
    return found


def end(vm: RestoredVm) -> None:
    os.kill(vm.pid, signal.SIGKILL)
    deadline_s = time.monotonic() + 60
    while vm.is_running and time.monotonic() < deadline_s:
        time.sleep(0.02)


def damaged(snapshot: Path, to: Path) -> Path:
    """A copy with a bit turned in some frames of what the guest filled its memory with."""
    shutil.copyfile(snapshot, to)
    with open_snapshot(snapshot) as opened:
        middle = opened.index.frame_count // 2
        frames = [opened.index.frame(number) for number in range(middle, middle + 4)]
    with to.open("r+b") as file:
        for frame in frames:
            file.seek(frame.offset_bytes + frame.stored_bytes // 2)
            byte = file.read(1)
            file.seek(-1, os.SEEK_CUR)
            file.write(bytes([byte[0] ^ 1]))
    return to


def test_it_runs_before_its_ram_is_there(source: GuestVm, snapshot: Path, places: Path) -> None:
    before = source.wait_tick().n
    take(source, snapshot.with_name("y.still"))
    vm = api.restore(snapshot.with_name("y.still"))
    assert vm.image_path is not None, vm.notes
    assert vm.resident_ms is None
    assert vm.first_instruction_ms is not None
    assert vm.state == "running"
    assert_goes_on(vm, after_tick=before)
    assert vm.wait_resident(FILL_S)
    assert vm.resident() == 1
    assert not Path(vm.image_path).exists()
    assert_goes_on(vm, after_tick=before)
    vm.kill()
    assert not vm.is_running
    assert not list(places.iterdir())


@pytest.mark.parametrize("how", ["wait", "stream"])
def test_all_of_ram_first(snapshot: Path, how: str) -> None:
    vm = api.restore(snapshot, **{how: True})
    assert (vm.image_path is None) == (how == "stream")
    assert vm.resident_ms is not None
    assert vm.first_instruction_ms is not None
    assert not fillers(vm)
    assert vm.wait_resident(0.1)
    assert_goes_on(vm)
    (recorded,) = list_restored()
    assert vm.first_instruction_ms <= (recorded.filled_ms() or 0) <= vm.resident_ms


@pytest.mark.parametrize("who", ["filler", "all"])
def test_a_killed_filler_has_an_heir(snapshot: Path, who: str) -> None:
    for _ in range(20):
        vm = api.restore(snapshot)
        assert vm.image_path is not None
        found = fillers(vm)
        for pid, parent in found.items():
            if who == "all" or parent not in found:
                with contextlib.suppress(ProcessLookupError):
                    os.kill(pid, signal.SIGKILL)
        if Path(vm.image_path).exists():
            break
        vm.kill()
    else:
        pytest.fail("no filler could be killed before it was through")
    if who == "all":  # nobody is left: the guest waits, until somebody looks
        time.sleep(0.5)
        assert Path(vm.image_path).exists()
        assert run("ps").returncode == 0
    deadline_s = time.monotonic() + FILL_S
    while Path(vm.image_path).exists() and time.monotonic() < deadline_s:
        time.sleep(0.05)
    assert not Path(vm.image_path).exists()
    assert_goes_on(vm)
    assert vm.first_instruction_ms is not None
    assert (vm.filled_ms() or 0) > vm.first_instruction_ms + (500 if who == "all" else 0)


@pytest.mark.parametrize("count", [1, 2])
def test_when_all_of_ram_was_there_is_told_later(snapshot: Path, count: int) -> None:
    """Nobody of ours waits: a process of its own fills, and others ask."""
    vms = api.fork(snapshot, count)
    assert [vm.resident_ms for vm in vms] == [None] * count
    assert all(vm.wait_resident(FILL_S) for vm in vms)
    shown = {vm["pid"]: vm["resident_ms"] for vm in json.loads(run("ps", "--json").stdout)}
    for vm in vms:
        assert shown[vm.pid] == vm.filled_ms()
        assert 0 < (vm.first_instruction_ms or 0) < shown[vm.pid]
        assert shown[vm.pid] < (time.monotonic() - vm.began_s) * 1000


def test_a_damaged_snapshot_is_said(snapshot: Path, tmp_path: Path) -> None:
    """The guest waits for what is damaged; it never gets anything else."""
    vm = api.restore(damaged(snapshot, tmp_path / "bad.still"), paused=True)
    with pytest.raises(DataError, match="damaged"):
        vm.wait_resident(FILL_S)
    assert vm.is_running
    share = vm.resident()
    assert share is not None
    assert share < 1
    assert vm.filled_ms() is None
    vm.kill()
    with pytest.raises(MachineError, match="has ended"):
        vm.wait_resident(1)


def test_clones_of_a_file(snapshot: Path, places: Path) -> None:
    vms = api.fork(snapshot, 3, name="c{n}")
    assert [vm.name for vm in vms] == ["c1", "c2", "c3"]
    assert len({vm.image_path for vm in vms}) == 1
    assert vms[0].image_path is not None
    for vm in vms:
        assert_goes_on(vm)
    assert all(vm.wait_resident(FILL_S) for vm in vms)
    for vm in vms:
        private = sum(
            int(line.split()[1]) << 10
            for line in Path(f"/proc/{vm.pid}/smaps_rollup").read_text().splitlines()
            if line.startswith("Private_Dirty")
        )
        assert private < RAM_MIB << 20
    end(vms[0])
    vms[1].kill()
    assert_goes_on(vms[2])
    api.kill("c3")
    assert not any(vm.is_running for vm in vms)
    api.restore(snapshot, paused=True)  # sweeps what the first one left
    assert len(list(places.iterdir())) == 1
    assert not list(FORKS.glob(f"{FORK_PREFIX}{os.getpid()}-*"))


def test_clones_of_a_running_vm(source: GuestVm, tmp_path: Path) -> None:
    before = source.wait_tick().n
    vms = api.fork(source.pid, 2)
    assert [vm.name for vm in vms] == ["origin-1", "origin-2"]
    for vm in vms:
        assert vm.wait_resident(FILL_S)
        assert_goes_on(vm, after_tick=before)
    assert {(vm.snapshot, vm.parent) for vm in vms} == {("", f"origin (pid {source.pid})")}
    assert not list(FORKS.glob(f"{FORK_PREFIX}{os.getpid()}-*/*.still"))
    assert source.is_progressing()
    (kept,) = api.fork(source.pid, keep=tmp_path / "kept.still", wait=True)
    assert_goes_on(kept, after_tick=before)
    assert api.verify(tmp_path / "kept.still").frames
    for vm in (*vms, kept):
        vm.kill()
    assert not list(FORKS.glob(f"{FORK_PREFIX}{os.getpid()}-*"))


def test_from_threads_and_asyncio(snapshot: Path, source: GuestVm) -> None:
    """The event loop turns while clones start; two forks of a file at once do not mind each
    other; of one VM, the second is told that it is busy."""

    async def all_at_once() -> list[list[RestoredVm] | BaseException]:
        turns = 0

        async def turn() -> None:
            nonlocal turns
            while True:
                await asyncio.sleep(0)
                turns += 1

        turning = asyncio.create_task(turn())
        forks = [
            asyncio.to_thread(api.fork, snapshot, 2, name="a{n}", paused=True),
            asyncio.to_thread(api.fork, snapshot, 1, name="b", paused=True),
            asyncio.to_thread(api.fork, source.pid, 1, name="c", paused=True),
            asyncio.to_thread(api.fork, source.pid, 1, name="d", paused=True),
        ]
        found = await asyncio.gather(*forks, return_exceptions=True)
        waits = [
            asyncio.to_thread(vm.wait_resident, FILL_S)
            for vms in found
            if not isinstance(vms, BaseException)
            for vm in vms
        ]
        assert all(await asyncio.gather(*waits))
        turning.cancel()
        assert turns
        return found

    first, second, *live = asyncio.run(all_at_once())
    assert isinstance(first, list)
    assert isinstance(second, list)
    refused = [one for one in live if isinstance(one, BaseException)]
    assert all(isinstance(one, BusyError) for one in refused)
    assert len(refused) < 2
    names = {vm.name for vms in (first, second) for vm in vms}
    assert {"a1", "a2", "b"} == names
    assert names < {vm.name for vm in list_restored()}
    for vm in (*first, *second):
        vm.kill()
        assert not vm.is_running
    assert source.is_progressing()


def test_restores_at_once_from_asyncio_are_awaited_by_several(snapshot: Path) -> None:
    """Each is a VM of its own; who waits for one is no hindrance to another who does."""

    async def all_at_once() -> tuple[list[RestoredVm], list[bool]]:
        starts = [asyncio.to_thread(api.restore, snapshot) for _ in range(3)]
        vms = await asyncio.gather(*starts)
        waits = [asyncio.to_thread(vm.wait_resident, FILL_S) for vm in vms * 2]
        return vms, await asyncio.gather(*waits)

    vms, waited = asyncio.run(all_at_once())
    assert waited == [True] * 6
    assert len({vm.pid for vm in vms}) == len({vm.qmp_address for vm in vms}) == 3
    for vm in vms:
        assert vm.resident() == 1
        assert_goes_on(vm)
    vms[0].kill()
    assert_goes_on(vms[1])


def test_clones_that_cannot_share_are_streamed(snapshot: Path) -> None:
    memory = ["-object", "memory-backend-ram,id=unused,size=4M"]  # the caller's own memory
    vms = api.fork(snapshot, 2, extra_args=memory)
    for vm in vms:
        assert vm.image_path is None
        assert any("all of RAM came before it ran" in note for note in vm.notes)
        assert_goes_on(vm)


@pytest.mark.parametrize("method", ["make", "begin"])
def test_what_an_image_lacks_makes_it_stream(
    snapshot: Path, monkeypatch: pytest.MonkeyPatch, method: str
) -> None:
    """Before QEMU is started, and when it waits for its stream already."""

    def refuse(*_: object, **__: object) -> None:
        raise HostError("no userfaultfd today")

    monkeypatch.setattr(Filling, method, refuse)
    for vm in (api.restore(snapshot), *api.fork(snapshot, 2)):
        assert vm.image_path is None
        assert any("no userfaultfd today" in note for note in vm.notes)
        assert not any("/proc/self/fd" in word for word in vm.argv)
        assert_goes_on(vm)


def test_names(snapshot: Path) -> None:
    for count, name in ((2, "same"), (0, "c{n}"), (1001, "c{n}"), (1, "")):
        with pytest.raises(UsageError):
            api.fork(snapshot, count, name=name)
    assert not list_restored()
    with pytest.raises(UsageError, match="snapshot already"):
        api.fork(snapshot, keep="y.still")


def test_only_ours_are_killed(source: GuestVm, snapshot: Path) -> None:
    with pytest.raises(NotFoundError, match="no VM"):
        api.kill(source.pid)
    api.fork(snapshot, 2, name="twin{n}", paused=True)
    first = api.restore(snapshot, paused=True)
    second = api.restore(snapshot, paused=True)
    with pytest.raises(UsageError, match="several"):
        api.kill(first.name)
    with pytest.raises(NotFoundError):
        api.kill("twin1", "nobody")
    assert len(list_restored()) == 4
    assert {vm.name for vm in api.kill("twin1", "twin2", str(first.pid), second.qmp_address)} == {
        "twin1", "twin2", "origin",
    }  # fmt: skip
    assert not list_restored()
    assert source.is_progressing()


def test_a_record_of_somebody_else_is_not_believed(
    source: GuestVm, snapshot: Path, places: Path
) -> None:
    vm = api.restore(snapshot, paused=True)
    record = Path(vm.directory, "restored.json")
    os.chown(record, 12345, -1)
    assert not list_restored()
    os.chown(record, os.geteuid(), -1)
    assert [one.pid for one in list_restored()] == [vm.pid]


def test_a_pid_that_is_somebody_elses_now(snapshot: Path) -> None:
    """It is not listed, and its end is not that other process's; ended twice is ended once."""
    vm = api.restore(snapshot, paused=True)
    end(vm)
    other = subprocess.Popen(["sleep", "600"])
    try:
        recycled = msgspec.structs.replace(vm, pid=other.pid)
        write_vm(recycled)
        assert not list_restored()
        assert not recycled.is_running
        with pytest.raises(NotFoundError):
            api.kill(other.pid)
        recycled.kill()
        recycled.kill()
        assert other.poll() is None
        assert not Path(vm.directory).exists()
    finally:
        other.kill()
        other.wait()


def test_on_the_command_line(snapshot: Path, tmp_path: Path) -> None:
    done = run("fork", snapshot, "-n", "2", "--name", "k{n}")
    assert done.returncode == 0, done.stderr
    assert b"k1" in done.stdout
    done = run("restore", snapshot, "--wait", "-q", "--json")
    assert done.returncode == 0, done.stderr
    shown = json.loads(done.stdout)
    assert shown["on_image"]
    assert 0 < shown["first_instruction_ms"] <= shown["resident_ms"]
    seen = {vm["name"]: vm for vm in json.loads(run("ps", "--json").stdout)}
    assert seen["k1"]["restored_from"] == str(snapshot)
    assert seen["k1"]["resident"] > 0
    assert b"x.still" in run("ps").stdout
    done = run("kill", "k1", "k2", shown["pid"])
    assert done.returncode == 0, done.stderr
    assert done.stdout.count(b"ended ") == 3
    assert run("kill", "k1").returncode == 9
    done = run("restore", damaged(snapshot, tmp_path / "bad.still"), "--wait")
    assert done.returncode == 8
    assert not list_restored()
