"""Clones of a running VM that run before its RAM was saved: what they read, who survives whom."""

from __future__ import annotations

import os
import select
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import msgspec
import pytest

from guests.qemu import GuestVm
from stillframe import api
from stillframe.errors import MachineError, StillframeError
from stillframe.restore.restored import FORK_PREFIX, FORKS, RestoredVm, list_restored
from tests.support.held_fork import RUN_S, HeldFork, held_fork
from tests.support.image_vm import differences, read_ram
from tests.support.newer_qemu import require_newer_qemu
from tests.support.probes import has_kvm, has_linux_guest, has_multiboot_guest, has_uffd_wp
from tests.support.restored_vms import assert_guest_goes_on
from tests.support.taking import REPOSITORY

pytestmark = [pytest.mark.qemu, pytest.mark.usefixtures("places")]

# Few ticks: under load the guest drops lines, an audit's answer too, that its buffer cannot take.
GUEST: dict[str, Any] = {
    "ram_mib": 128, "mem_mib": 8, "populate_mib": 24, "rate_mib_per_s": 10, "tick_ms": 500,
    "name": "origin",
}  # fmt: skip
NUMA = (
    "-object", "memory-backend-memfd,id=low,size=48M,share=on",
    "-object", "memory-backend-ram,id=high,size=80M",
    "-numa", "node,nodeid=0,cpus=0,memdev=low", "-numa", "node,nodeid=1,memdev=high",
)  # fmt: skip
PAGES = 2048
VAPIC_PAGE = 0xE8


@pytest.fixture(scope="module")
def source() -> Iterator[GuestVm]:
    has_linux_guest().require()
    has_uffd_wp().require()
    with GuestVm("linux", **GUEST).start() as vm:
        yield vm


def assert_goes_on(vm: RestoredVm | GuestVm, after_tick: int = 0) -> None:
    """The guest runs, its memory is what it wrote, and it has not started anew."""
    if isinstance(vm, RestoredVm):
        assert_guest_goes_on(vm, PAGES, after_tick)
        return
    assert vm.is_progressing()
    assert vm.command("audit").startswith(f"audit ok pages={PAGES} ")


def await_end(pid: int) -> None:
    try:
        pidfd = os.pidfd_open(pid)
    except ProcessLookupError:
        return
    poll = select.poll()
    poll.register(pidfd, select.POLLIN)
    assert poll.poll(RUN_S * 1000)
    os.close(pidfd)


def assert_nothing_left(places: Path) -> None:
    assert not list_restored()
    assert not [path for path in places.glob("*") if not path.name.startswith(".")]
    assert not list(FORKS.glob(f"{FORK_PREFIX}{os.getpid()}-*"))


def test_they_have_what_they_touch_before_it_is_swept(source: GuestVm, places: Path) -> None:
    before = source.wait_tick().n
    with held_fork(source.pid, 2) as fork:
        assert [vm.name for vm in fork.vms] == ["origin-1", "origin-2"]
        for vm in fork.vms:
            assert_goes_on(vm, after_tick=before)
            assert vm.resident() < 1
        assert [vm.pid for vm in list_restored()] == sorted(vm.pid for vm in fork.vms)
        assert not fork.vms[0].wait_resident(0)
        assert_goes_on(source)
        fork.go_on()
        for vm in fork.done:
            assert vm.resident() == 1
            assert vm.wait_resident(0)
            assert vm.first_instruction_ms < vm.resident_ms
            assert_goes_on(vm, after_tick=before)
    os.kill(fork.vms[0].pid, signal.SIGKILL)
    await_end(fork.vms[0].pid)
    assert_goes_on(fork.vms[1])
    assert_goes_on(source)
    for vm in fork.vms:
        vm.kill()
    assert_nothing_left(places)


@pytest.fixture(params=["memfd", "private, KVM", "NUMA", "NUMA, newer QEMU"])
def any_source(request: pytest.FixtureRequest) -> Iterator[GuestVm]:
    """The newer QEMU is in no usual place, and finds its libraries by its environment: clones are
    to be the same one."""
    if request.param == "memfd":
        yield request.getfixturevalue("source")
        return
    if request.param.startswith("NUMA"):
        has_linux_guest().require()
        has_uffd_wp().require()
        binary = require_newer_qemu() if "newer" in request.param else None
        options = {**GUEST, "memory": "private", "extra": NUMA, "binary": binary}
        with GuestVm("linux", **options).start() as vm:
            yield vm
        return
    has_kvm().require()
    has_multiboot_guest().require()
    with GuestVm(
        "multiboot", accelerator="kvm", ram_mib=96, mem_mib=48, clock_pages=16, memory="private",
        rate_mib_per_s=50, name="origin",
    ).start() as vm:  # fmt: skip
        yield vm


def test_all_of_ram_is_the_instants(any_source: GuestVm, tmp_path: Path) -> None:
    """What a clone reads before it is swept, what it has afterwards, and what is kept are one."""
    file = tmp_path / "kept.still"
    with held_fork(any_source.pid, 3, paused=True, keep=file) as fork:
        first, *others = fork.vms
        assert os.path.samefile(f"/proc/{first.pid}/exe", f"/proc/{any_source.pid}/exe")
        early = read_ram(first.pid, first.qmp_address)
        assert any_source.is_progressing()  # it overwrites what was read, and what was not
    assert api.verify(file).frames
    # With KVM, QEMU itself patches the ROM of its vapic (hw/i386/kvmvapic.c, vapic_post_load).
    allowed = {("pc.ram", VAPIC_PAGE)} if any_source.accelerator == "kvm" else set()
    assert set(differences(early, file)) <= allowed
    for vm in others:
        assert set(differences(read_ram(vm.pid, vm.qmp_address), file)) <= allowed
        assert vm.snapshot == str(file)


def test_a_clone_that_dies_disturbs_no_other(source: GuestVm) -> None:
    with held_fork(source.pid, 2) as fork:
        os.kill(fork.vms[0].pid, signal.SIGKILL)
        await_end(fork.vms[0].pid)
        assert_goes_on(fork.vms[1])
        fork.go_on()
        assert_goes_on(fork.vms[1])
    assert_goes_on(source)


def test_without_clones_it_is_given_up(source: GuestVm, places: Path) -> None:
    with HeldFork(source.pid, 2) as fork:
        for vm in fork.vms:
            os.kill(vm.pid, signal.SIGKILL)
    assert isinstance(fork.failure, MachineError)
    assert "all clones have ended" in str(fork.failure)
    assert_goes_on(source)
    assert_nothing_left(places)


def test_a_clone_that_does_not_start_leaves_nothing(
    source: GuestVm, tmp_path: Path, places: Path
) -> None:
    """Neither a clone nor half of a snapshot; QEMU's own words are the error's."""
    place = tmp_path / "kept"
    place.mkdir()
    wrong = ["-device", "virtio-rng-pci,addr=0x7ffff"]
    with pytest.raises(MachineError, match="QEMU ended"):
        api.fork(source.pid, 2, keep=place / "kept.still", extra_args=wrong)
    assert not list(place.iterdir())
    assert_nothing_left(places)
    assert source.is_progressing()


@pytest.mark.parametrize("when", ["before", "after"])
def test_the_source_dies(source: GuestVm, when: str, places: Path) -> None:
    """Before its RAM was saved, the clones end: nobody has the rest. After it they go on."""
    (origin,) = api.fork(source.pid)  # forked in turn
    if when == "before":
        with HeldFork(origin.pid, 2) as fork:
            os.kill(origin.pid, signal.SIGKILL)
            await_end(origin.pid)
        assert isinstance(fork.failure, StillframeError)
        assert not any(clone.is_running for clone in fork.vms)
        origin.kill()
        assert_nothing_left(places)
        return
    clones = api.fork(origin.pid, 2)
    origin.kill()
    for clone in clones:
        assert_goes_on(clone)


def test_the_forking_process_dies(source: GuestVm, places: Path) -> None:
    """The clones end, for nobody can give them the rest, and never read zeroes; the source goes
    on."""
    child = subprocess.Popen(
        [sys.executable, "-m", "tests.support.held_fork", str(source.pid), "2"],
        cwd=REPOSITORY, stdin=subprocess.PIPE, stdout=subprocess.PIPE,
    )  # fmt: skip
    assert child.stdout is not None
    vms = msgspec.json.decode(child.stdout.readline(), type=list[RestoredVm])
    assert len(vms) == 2
    child.kill()
    child.communicate()
    for vm in vms:
        await_end(vm.pid)
        with pytest.raises(MachineError):
            vm.wait_resident(RUN_S)
    assert_goes_on(source)
    (again,) = api.fork(source.pid)
    assert_goes_on(again)
    again.kill()
    assert_nothing_left(places)
