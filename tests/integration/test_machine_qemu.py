"""Finding, describing and reading real QEMUs: RAM blocks, memory map, device state, pre-flight.

``STILLFRAME_QEMU`` names another QEMU to run all of it with.
"""

from __future__ import annotations

import contextlib
import mmap
import os
import re
import signal
import socket
import struct
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from stillframe.errors import BusyError, MachineError, NotFoundError, RefusedError, UsageError
from stillframe.machine.finding import connect, find_vm, list_vms
from stillframe.machine.process.device_state import DeviceStateSaver, save_device_state
from stillframe.machine.process.vm_info import VmInfo
from stillframe.machine.qemu import ramblocks
from stillframe.machine.qemu.machine import QemuMachine
from stillframe.machine.qemu.ram_list import RamListError
from stillframe.machine.qemu.ramblocks import QemuRamTable
from stillframe.model import RamBlock
from stillframe.qmp.client import QmpClient
from stillframe.qmp.command import QmpCommandError
from tests.support.bare_vm import BareVm
from tests.support.listening import wait_listening
from tests.support.probes import has_huge_pages, has_kvm, has_qemu
from tests.support.waiting import wait_until

pytestmark = [
    pytest.mark.qemu,
    pytest.mark.skipif(not has_qemu(), reason=f"missing qemu: {has_qemu().reason}"),
]

MIB = 1 << 20
MAIN = ["-machine", "memory-backend=m0"]
BIOS_S = 0.8

# Other runs of these tests may be under way on this host.
BOOTED_NAME, KVM_NAME, REL_NAME, PRETTY_NAME, INHERITED_NAME, TWIN_NAME = (
    f"still-{kind}-{os.getpid()}" for kind in ("booted", "kvm", "rel", "pretty", "fd", "twin")
)


def free_port() -> int:
    with socket.create_server(("127.0.0.1", 0)) as listener:
        return int(listener.getsockname()[1])


@pytest.fixture(scope="module")
def booted() -> Iterator[BareVm]:
    """A q35 whose BIOS has run, with disks and a name."""
    with BareVm("-M", "q35", "-m", "128", "-smp", "2", name=f"guest={BOOTED_NAME},process=x") as vm:
        time.sleep(BIOS_S)
        yield vm


def by_name(blocks: list[RamBlock]) -> dict[str, RamBlock]:
    return {block.idstr: block for block in blocks}


def monitor_sees(machine: QemuMachine) -> set[tuple[str, int]]:
    """Name and used length of every named block, read from the monitor in another way."""
    text = machine.qmp.hmp("info ramblock")
    lines = re.findall(r"^ *(\S+) +\S+ \S+ +0x\w+ +0x(\w+) +0x\w+", text, re.MULTILINE)
    return {(name, int(used, 16)) for name, used in lines}


# RAM blocks

MACHINES: dict[str, tuple[list[str], str, dict[str, Any]]] = {
    "q35": (["-M", "q35", "-m", "64"], "pc.ram", {"backing": "anonymous", "shared": False}),
    "pc": (["-M", "pc", "-m", "64"], "pc.ram", {"backing": "anonymous"}),
    "microvm": (["-M", "microvm", "-m", "64"], "microvm.ram", {"backing": "anonymous"}),
    "memfd-shared": (
        ["-m", "64", "-object", "memory-backend-memfd,id=m0,size=64M,share=on", *MAIN],
        "m0",
        {"backing": "memfd", "shared": True},
    ),
    "memfd-private": (
        ["-m", "64", "-object", "memory-backend-memfd,id=m0,size=64M,share=off", *MAIN],
        "m0",
        {"backing": "memfd", "shared": False},
    ),
    "ram-shared": (
        ["-m", "64", "-object", "memory-backend-ram,id=m0,size=64M,share=on", *MAIN],
        "m0",
        {"shared": True},
    ),
    "tmpfs-shared": (
        ["-m", "64", "-object", "memory-backend-file,id=m0,size=64M,share=on,mem-path={shm}",
         *MAIN],
        "m0",
        {"backing": "shmem", "shared": True, "backing_path": "{shm}"},
    ),
    "file-shared": (
        ["-m", "64", "-object", "memory-backend-file,id=m0,size=64M,share=on,mem-path={disk}",
         *MAIN],
        "m0",
        {"backing": "file", "shared": True, "backing_path": "{disk}"},
    ),
    "file-private": (
        ["-m", "64", "-object", "memory-backend-file,id=m0,size=64M,share=off,mem-path={disk}",
         *MAIN],
        "m0",
        {"backing": "file", "shared": False},
    ),
    "numa": (
        ["-m", "128", "-object", "memory-backend-ram,id=m0,size=64M", "-object",
         "memory-backend-memfd,id=m1,size=64M", "-smp", "2", "-numa", "node,memdev=m0",
         "-numa", "node,memdev=m1"],
        "m1",
        {"backing": "memfd"},
    ),
    "dimm": (
        ["-m", "64,slots=2,maxmem=1G", "-object", "memory-backend-ram,id=d0,size=128M",
         "-device", "pc-dimm,memdev=d0,id=dimm0"],
        "d0",
        {"backing": "anonymous", "used_length_bytes": 128 * MIB},
    ),
}  # fmt: skip


@pytest.mark.parametrize("kind", MACHINES)
def test_ram_blocks(kind: str, tmp_path: Path) -> None:
    arguments, main, expected = MACHINES[kind]
    shm = Path("/dev/shm") / f"stillframe-test-{os.getpid()}"
    places = {"shm": str(shm), "disk": str(tmp_path / "ram")}
    try:
        with (
            BareVm("-S", *(word.format(**places) for word in arguments)) as vm,
            connect(vm.qmp) as machine,
        ):
            blocks = machine.ram_blocks()
            assert {(b.idstr, b.used_length_bytes) for b in blocks} == monitor_sees(machine)
            sizes = [block.max_length_bytes for block in blocks]
            assert sizes == sorted(sizes, reverse=True), "QEMU's order, for MEM_SIZE"
            block = by_name(blocks)[main]
            for field, value in expected.items():
                wanted = value.format(**places) if isinstance(value, str) else value
                assert getattr(block, field) == wanted, field
            assert block.page_size_bytes == 4096
            if block.backing_fd is not None:
                linked = os.stat(f"/proc/{vm.pid}/fd/{block.backing_fd}")
                assert linked.st_size == block.used_length_bytes
            assert (block.backing == "anonymous") == (block.backing_path is None)
            assert machine.blocks_signature() == machine.blocks_signature()
            assert_content(machine, vm, tmp_path)
    finally:
        shm.unlink(missing_ok=True)


def assert_content(machine: QemuMachine, vm: BareVm, directory: Path) -> None:
    """The blocks' addresses and the memory map are right: QEMU shows the same bytes there."""
    blocks = machine.ram_blocks()
    known = by_name(blocks)
    ranges = machine.memory_map(blocks)
    assert ranges
    dump = directory / "dump"
    with Path(f"/proc/{vm.pid}/mem").open("rb", buffering=0) as memory:
        for run in ranges:
            for at in {0, max(0, run.length_bytes - 65536)}:
                size = min(65536, run.length_bytes)
                machine.qmp.execute(
                    "pmemsave", {"val": run.gpa + at, "size": size, "filename": str(dump)}
                )
                memory.seek(known[run.idstr].hva + run.offset_bytes + at)
                assert memory.read(size) == dump.read_bytes(), run


def test_the_content_of_a_booted_machine(booted: BareVm, tmp_path: Path) -> None:
    with connect(booted.qmp) as machine:
        machine.stop()
        try:
            assert_content(machine, booted, tmp_path)
            bios = by_name(machine.ram_blocks())["pc.bios"]
            with Path(f"/proc/{booted.pid}/mem").open("rb", buffering=0) as memory:
                memory.seek(bios.hva + bios.used_length_bytes - 16)
                assert memory.read(1) in b"\xea\xe9", "the reset vector: a jump"
        finally:
            machine.cont()


def test_huge_pages() -> None:
    has_huge_pages(64).require()
    backend = "memory-backend-memfd,id=m0,size=64M,hugetlb=on,hugetlbsize=2M"
    with (
        BareVm("-S", "-m", "64", "-object", backend, *MAIN) as vm,
        connect(vm.qmp) as machine,
    ):
        block = by_name(machine.ram_blocks())["m0"]
        assert block.page_size_bytes == 2 * MIB
        assert block.backing == "hugetlbfs"
        assert block.pages == 32


def test_main_ram_is_split_around_the_hole_below_4_gib() -> None:
    with (
        BareVm("-S", "-M", "q35", "-m", "6144") as vm,
        connect(vm.qmp) as machine,
    ):
        ram = [run for run in machine.memory_map(machine.ram_blocks()) if run.idstr == "pc.ram"]
        assert (ram[0].gpa, ram[0].offset_bytes) == (0, 0)
        above = [run for run in ram if run.gpa >= 4 << 30]
        assert [(run.gpa, run.length_bytes, run.offset_bytes) for run in above] == [
            (4 << 30, 4 << 30, 2 << 30)
        ]
        below = [run for run in ram if run.gpa < 4 << 30]
        assert all(run.gpa == run.offset_bytes for run in below)
        assert below[-1].gpa + below[-1].length_bytes == 2 << 30


@pytest.mark.skipif(not has_kvm(), reason=f"missing kvm: {has_kvm().reason}")
def test_a_kvm_machine() -> None:
    with (
        BareVm("-accel", "kvm", "-M", "q35", "-m", "64", "-S", name=KVM_NAME) as vm,
        connect(vm.qmp) as machine,
    ):
        ram = [run for run in machine.memory_map(machine.ram_blocks()) if run.idstr == "pc.ram"]
        assert sum(run.length_bytes for run in ram) >= 63 * MIB
        assert machine.describe().accelerator == "kvm"
        assert find_vm(KVM_NAME).accelerator == "kvm"


class _NoList:
    def __init__(self, _pid: int) -> None:
        raise RamListError("left out by the test")


class _OldMonitor:
    """A monitor that prints no host addresses, as before QEMU 8.0."""

    def __init__(self, qmp: QmpClient) -> None:
        self._qmp = qmp

    def hmp(self, line: str) -> str:
        text = self._qmp.hmp(line)
        if line == "info ramblock":
            text = re.sub(r"\s+0x[0-9a-f]+\s+r[ow]\s*$", "", text, flags=re.MULTILINE)
        return text


def read_ram_blocks(pid: int, qmp: QmpClient) -> list[RamBlock]:
    with contextlib.closing(QemuRamTable(pid, qmp)) as table:
        return table.read()


def test_all_ways_of_finding_the_blocks_agree(
    booted: BareVm, monkeypatch: pytest.MonkeyPatch
) -> None:
    with QmpClient.connect(booted.qmp) as qmp:
        by_list = read_ram_blocks(booted.pid, qmp)
        monkeypatch.setattr(ramblocks, "RamList", _NoList)
        old: Any = _OldMonitor(qmp)
        assert read_ram_blocks(booted.pid, old) == by_list
        if qmp.version >= (8, 0, 0):
            assert read_ram_blocks(booted.pid, qmp) == by_list


def test_blocks_that_cannot_be_told_apart_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    cards = ["-device", "VGA", "-device", "secondary-vga"]
    with BareVm("-S", "-nodefaults", "-m", "64", *cards) as vm, QmpClient.connect(vm.qmp) as qmp:
        assert len(read_ram_blocks(vm.pid, qmp)) >= 6
        monkeypatch.setattr(ramblocks, "RamList", _NoList)
        old: Any = _OldMonitor(qmp)
        with pytest.raises(RefusedError, match=r"vga\.vram") as caught:
            read_ram_blocks(vm.pid, old)
        assert "8.0" in str(caught.value)


_64M, _128M, _256M = (f"0x{mib * MIB:016x}" for mib in (64, 128, 256))
LIES = {
    "name": ("pc.bios", "pc.soib"),
    "used length": (f"{_128M} {_128M}", f"{_64M} {_128M}"),
    "total length": (f"{_128M} {_128M}", f"{_128M} {_256M}"),
}


@pytest.mark.parametrize("kind", LIES)
def test_a_list_that_disagrees_with_the_monitor_is_refused(booted: BareVm, kind: str) -> None:
    truth, lie = LIES[kind]

    class Lying(_OldMonitor):
        def hmp(self, line: str) -> str:
            text = super().hmp(line)
            assert line != "info ramblock" or truth in text
            return text.replace(truth, lie)

    with QmpClient.connect(booted.qmp) as qmp:
        lying: Any = Lying(qmp)
        with pytest.raises(RefusedError, match="do not agree"):
            read_ram_blocks(booted.pid, lying)


def test_memory_that_is_not_plugged_in_is_no_block() -> None:
    spare = ["-object", "memory-backend-ram,id=spare,size=3M"]
    with BareVm("-S", "-m", "64", *spare) as vm, connect(vm.qmp) as machine:
        assert " 0x0000000000300000 0x0000000000300000" in machine.qmp.hmp("info ramblock")
        blocks = machine.ram_blocks()
        assert 3 * MIB not in {block.used_length_bytes for block in blocks}
        assert "" not in by_name(blocks)
        assert {(b.idstr, b.used_length_bytes) for b in blocks} == monitor_sees(machine)


def page_at(pid: int, address: int) -> bytes:
    with Path(f"/proc/{pid}/mem").open("rb", buffering=0) as memory:
        memory.seek(address)
        return memory.read(4096)


def test_shared_memory_is_the_same_through_its_file(tmp_path: Path) -> None:
    """What the snapshotter maps itself: descriptor and offset lead to the block's bytes."""
    file = tmp_path / "ram"
    file.write_bytes(bytes(65 * MIB))
    plain = f"memory-backend-file,id=m0,size=64M,share=on,mem-path={file}"
    memfd = "memory-backend-memfd,id=m0,size=64M,share=on"
    offsets = {plain: 0, memfd: 0}
    with BareVm("-S", "-m", "32") as probe, QmpClient.connect(probe.qmp) as qmp:
        if qmp.version >= (8, 1, 0):
            offsets[f"{plain},offset=1M"] = MIB
    for backend, offset in offsets.items():
        with (
            BareVm("-M", "q35", "-m", "64", "-object", backend, *MAIN) as vm,
            connect(vm.qmp) as machine,
        ):
            block = by_name(machine.ram_blocks())["m0"]
            assert block.backing_offset_bytes == offset
            wait_until(lambda at=(vm.pid, block.hva): any(page_at(*at)))  # the BIOS's tables
            machine.stop()
            seen = page_at(vm.pid, block.hva)
            with Path(f"/proc/{vm.pid}/fd/{block.backing_fd}").open("rb", buffering=0) as backing:
                backing.seek(block.backing_offset_bytes)
                assert backing.read(4096) == seen


def test_hotplug_changes_the_signature() -> None:
    with (
        BareVm("-S", "-m", "64,slots=2,maxmem=1G") as vm,
        connect(vm.qmp) as machine,
    ):
        before = machine.ram_blocks()
        signature = machine.blocks_signature()
        backend = {"qom-type": "memory-backend-ram", "id": "d0", "size": 128 * MIB}
        machine.qmp.execute("object-add", backend)
        machine.qmp.execute("device_add", {"driver": "pc-dimm", "id": "dimm0", "memdev": "d0"})
        assert machine.blocks_signature() != signature
        after = machine.ram_blocks()
        assert set(by_name(after)) - set(by_name(before)) == {"d0"}


# Device state


def test_device_state_is_a_stream_and_the_same_twice(booted: BareVm) -> None:
    with connect(booted.qmp) as machine:
        machine.stop()
        try:
            machine.prepare_device_state()
            first = machine.save_device_state()
            second = machine.save_device_state()
            assert first[:8].hex() == "5145564d00000003"
            assert first[8] == 4, "no configuration, no RAM: a FULL section comes first"
            assert first[-1] == 0, "EOF"
            assert b"pc-q35" not in first[:64]
            assert first == second
            assert machine.status() == "paused"
        finally:
            machine.cont()
        assert machine.status() == "running"
        # QEMU drops a removed descriptor only while the guest runs (monitor/fds.c).
        machine.finish_device_state()
        machine.finish_device_state()
        assert machine.qmp.execute("query-fdsets") == []


def test_saving_a_running_machine_leaves_it_running(booted: BareVm) -> None:
    with connect(booted.qmp) as machine:
        assert machine.save_device_state()[:4] == b"QEVM"
        assert machine.status() == "running"


def test_device_state_over_tcp_needs_no_descriptors(tmp_path: Path) -> None:
    port = free_port()
    tcp = f"tcp:127.0.0.1:{port},server=on,wait=off"
    disk = ["-drive", "if=none,id=d,driver=null-co,size=1M", "-device", "virtio-blk-pci,drive=d"]
    with (
        BareVm("-S", "-m", "64", "-qmp", tcp, *disk) as vm,
        connect(f"127.0.0.1:{port}") as machine,
        QmpClient.connect(vm.qmp) as other,
    ):
        assert machine.pid == vm.pid
        over_tcp = machine.save_device_state()
        assert over_tcp == machine.save_device_state()
        assert over_tcp == save_device_state(other, vm.pid)
        machine.finish_device_state()
    assert not list(tmp_path.glob("stillframe-*"))


def test_a_failed_save_says_so_and_cleans_up(booted: BareVm) -> None:
    with QmpClient.connect(booted.qmp) as qmp:
        saver = DeviceStateSaver(qmp, booted.pid)
        saver.prepare()
        for fdset in qmp.execute("query-fdsets"):  # type: ignore[attr-defined]
            qmp.execute("remove-fd", {"fdset-id": fdset["fdset-id"]})
        with pytest.raises(QmpCommandError, match="xen-save-devices-state"):
            saver.save()
        saver.finish()
        assert qmp.execute("query-fdsets") == []
        assert save_device_state(qmp, booted.pid)[:4] == b"QEVM"


def test_announced_commands_are_run_only_when_completed(booted: BareVm) -> None:
    with QmpClient.connect(booted.qmp) as qmp:
        for _ in range(3):
            qmp.announce("stop")
            time.sleep(0.02)
            assert qmp.execute("query-status")["status"] == "running"  # type: ignore[index]
            qmp.announce("human-monitor-command", {"command-line": "stop"})
            qmp.announce("stop")
            qmp.execute("stop")
            assert qmp.execute("query-status")["status"] == "paused"  # type: ignore[index]
            qmp.announce("cont")
            qmp.execute("cont")
        reset = threading.Event()
        qmp.subscribe(lambda event: reset.set() if event.name == "RESET" else None)
        qmp.announce("stop")
        # A guard that inherited the connection has to say its command all the same.
        with qmp.socket.dup() as guard:
            guard.sendall(b'\xff\n{"execute": "system_reset", "id": "guard"}\n')
        assert reset.wait(60)


# Finding and describing


def test_list_vms_tells_what_runs(booted: BareVm) -> None:
    def asked() -> VmInfo:
        return next(vm for vm in list_vms(ask_version=True) if vm.pid == booted.pid)

    # It is asked for a moment only, in which a busy host may leave it no time to answer.
    wait_until(lambda: asked().version is not None)
    vm = next(vm for vm in list_vms() if vm.pid == booted.pid)
    assert vm.name == BOOTED_NAME
    assert vm.ram_bytes == 128 * MIB
    assert vm.accelerator == "tcg"
    assert vm.uid == os.getuid()
    assert abs(vm.started_s - time.time()) < 3600
    assert vm.qmp_addresses == (booted.qmp, booted.second_qmp)
    found: list[str | None] = []
    wait_until(lambda: found.append(asked().version) or found[-1] is not None)
    assert re.fullmatch(r"\d+\.\d+\.\d+", found[-1] or "")


def test_a_held_monitor_is_not_waited_for_by_ps(booted: BareVm) -> None:
    with QmpClient.connect(booted.qmp), QmpClient.connect(booted.second_qmp):
        began = time.monotonic()
        vm = next(vm for vm in list_vms(ask_version=True) if vm.pid == booted.pid)
        assert vm.version is None
        assert time.monotonic() - began < 10, "five seconds for each, as for any other command"


def test_a_vm_is_found_by_name_pid_and_socket(booted: BareVm) -> None:
    for ref in (BOOTED_NAME, str(booted.pid), booted.qmp, f"unix:{booted.second_qmp}"):
        with connect(ref) as machine:
            assert machine.pid == booted.pid
    assert find_vm(booted.second_qmp).qmp_addresses == (booted.second_qmp, booted.qmp)


def test_relative_sockets_and_host_and_port(tmp_path: Path) -> None:
    port = free_port()
    tcp = f"tcp::{port},server=on,wait=off"
    mon = ["-chardev", f"socket,id=c0,path={tmp_path}/a,,b,server=on,wait=off"]
    with BareVm(
        "-S", "-m", "32", "-qmp", "unix:rel,server=on,wait=off", "-qmp", tcp, *mon,
        "-mon", "chardev=c0,mode=control", cwd=tmp_path, qmp=False, name=REL_NAME,
    ) as vm:  # fmt: skip
        wait_listening(tmp_path / "a,b", alive=lambda: vm.process.poll() is None)
        found = find_vm(REL_NAME)
        assert found.pid == vm.pid
        assert found.qmp_addresses == (
            str(tmp_path / "rel"), ("127.0.0.1", port), str(tmp_path / "a,b"),
        )  # fmt: skip
        for address in (str(tmp_path / "rel"), str(tmp_path / "a,b"), f"localhost:{port}"):
            assert find_vm(address).pid == vm.pid
            with connect(address) as machine:
                assert machine.pid == vm.pid


def test_a_pretty_monitor_speaks_many_lines(tmp_path: Path) -> None:
    path = tmp_path / "pretty"
    pretty = ["-qmp-pretty", f"unix:{path},server=on,wait=off"]
    with BareVm("-S", "-m", "32", *pretty, name=PRETTY_NAME, qmp=False) as vm:
        wait_listening(path, alive=lambda: vm.process.poll() is None)
        with connect(PRETTY_NAME) as machine:
            assert machine.pid == vm.pid
            assert machine.save_device_state()[:4] == b"QEVM"
            assert len(machine.ram_blocks()) > 3


def test_a_vanished_vm_is_noticed_at_once() -> None:
    with BareVm("-m", "32") as vm, connect(vm.qmp) as machine:
        began = time.monotonic()
        vm.process.kill()
        vm.process.wait()
        with pytest.raises(MachineError, match="lost the monitor"):
            machine.status()
        assert time.monotonic() - began < 5
        assert not machine.qmp.alive
        with pytest.raises(MachineError):
            machine.ram_blocks()
        with pytest.raises(MachineError):
            machine.save_device_state()


def test_a_stuck_vm_is_a_clear_error() -> None:
    with BareVm("-S", "-m", "32") as vm, QmpClient.connect(vm.qmp) as qmp:
        os.kill(vm.pid, signal.SIGSTOP)
        try:
            with pytest.raises(MachineError, match="did not answer 'query-status'"):
                qmp.execute("query-status", timeout_s=0.2)
            with pytest.raises(BusyError, match="main loop is stuck"):
                QmpClient.connect(vm.second_qmp, timeout_s=0.2)
        finally:
            os.kill(vm.pid, signal.SIGCONT)
        assert qmp.execute("query-status", timeout_s=60)


def test_a_socket_whose_path_was_used_before_is_asked_itself(tmp_path: Path) -> None:
    path = tmp_path / "q"
    monitor = ["-S", "-m", "32", "-qmp", f"unix:{path},server=on,wait=off"]
    with BareVm(*monitor):
        path.unlink()
        with BareVm(*monitor) as second:
            wait_listening(path, alive=lambda: second.process.poll() is None)
            assert find_vm(str(path)).pid == second.pid
            with connect(str(path)) as machine:
                assert machine.pid == second.pid


def test_an_inherited_monitor_socket_is_found(tmp_path: Path) -> None:
    path = tmp_path / "inherited"
    with socket.socket(socket.AF_UNIX) as listener:
        listener.bind(str(path))
        listener.listen(1)
        # dup2 gives a descriptor without close-on-exec at a number that Popen would close;
        # so QEMU is started by a shell-less exec that keeps it.
        fd = os.dup(listener.fileno())
        os.set_inheritable(fd, True)
        pid = os.fork()
        if pid == 0:
            with contextlib.suppress(BaseException):
                from guests.qemu import qemu_binary

                chardev = f"socket,id=c0,fd={fd},server=on,wait=off"
                os.execv(
                    qemu_binary(),
                    ["qemu-system-x86_64", "-S", "-m", "32", "-display", "none", "-name",
                     INHERITED_NAME, "-chardev", chardev, "-mon", "chardev=c0,mode=control",
                     "-accel", "tcg"],
                )  # fmt: skip
            os._exit(127)
        os.close(fd)
    try:
        deadline = time.monotonic() + 60
        while True:
            with contextlib.suppress(NotFoundError, BusyError):
                with connect(INHERITED_NAME) as machine:
                    assert machine.pid == pid
                break
            assert time.monotonic() < deadline
            time.sleep(0.05)
        assert find_vm(str(path)).pid == pid
    finally:
        os.kill(pid, 9)
        os.waitpid(pid, 0)


def test_an_ambiguous_name_and_a_vm_without_monitor() -> None:
    with (
        BareVm("-S", "-m", "32", name=TWIN_NAME) as one,
        BareVm("-S", "-m", "32", name=TWIN_NAME, qmp=False) as two,
    ):
        wait_until(lambda: two.pid in {vm.pid for vm in list_vms()})
        with pytest.raises(UsageError, match=f"2 VMs.*{one.pid}, {two.pid}|{two.pid}, {one.pid}"):
            find_vm(TWIN_NAME)
        with pytest.raises(UsageError, match="no QMP monitor"):
            find_vm(str(two.pid))


@pytest.mark.parametrize("ref", ["no-such-vm", "999999999", "/nonexistent/qmp", "127.0.0.1:1"])
def test_nothing_is_found(ref: str) -> None:
    with pytest.raises(NotFoundError):
        find_vm(ref)


def test_a_process_that_is_no_vm() -> None:
    with pytest.raises(UsageError, match="is no VM"):
        find_vm(str(os.getpid()))


def test_a_held_monitor_is_busy_and_another_is_used(booted: BareVm) -> None:
    with QmpClient.connect(booted.qmp):
        with pytest.raises(BusyError, match="in use by another client"):
            connect(booted.qmp, timeout_s=0.3)
        with connect(BOOTED_NAME, timeout_s=3) as machine:
            assert machine.qmp.address == booted.second_qmp
        with (
            QmpClient.connect(booted.second_qmp),
            pytest.raises(BusyError),
        ):
            connect(str(booted.pid), timeout_s=0.3)


def test_describe(booted: BareVm, tmp_path: Path) -> None:
    with connect(booted.qmp) as machine:
        record = machine.describe()
    assert re.fullmatch(r"pc-q35-\d+\.\d+", record.machine_type)
    assert record.name == BOOTED_NAME
    assert record.pid == booted.pid
    assert record.vmm == "qemu"
    assert (
        record.vmm_version
        == ".".join(record.machine_type.rpartition("-")[2].split("."))
        + (record.vmm_version[record.vmm_version.rindex(".") :])
    )
    assert record.vcpus == 2
    assert record.accelerator == "tcg"
    assert record.argv == tuple(
        Path(f"/proc/{booted.pid}/cmdline").read_text().removesuffix("\0").split("\0")
    )
    assert Path(record.executable).exists()
    assert record.cwd == str(Path.cwd())
    assert record.guest_state == "running"


def test_describe_tells_the_disks(tmp_path: Path) -> None:
    image = tmp_path / "disk.raw"
    image.write_bytes(bytes(MIB))
    drive = f"if=none,id=d0,format=raw,file={image},node-name=n0,readonly=on"
    with (
        BareVm("-S", "-M", "pc", "-m", "32", "-nodefaults", "-drive", drive, "-device",
               "virtio-blk-pci,drive=d0,id=blk0") as vm,
        connect(vm.qmp) as machine,
    ):  # fmt: skip
        record = machine.describe()
    assert record.machine_type.startswith("pc-i440fx-")
    (disk,) = record.disks
    assert (disk.device, disk.node_name, disk.filename) == ("d0", "n0", str(image))
    assert disk.read_only
    assert disk.driver == "raw"
    assert "blk0" in disk.qdev


def test_stop_cont_and_events(booted: BareVm) -> None:
    with connect(booted.qmp) as machine:
        watch = machine.watch()
        machine.stop()
        assert machine.status() == "paused"
        machine.cont()
        assert machine.status() == "running"
        machine.qmp.execute("system_reset")
        deadline = time.monotonic() + 60
        while "RESET" not in {event.name for event in watch.seen()}:
            assert time.monotonic() < deadline
            time.sleep(0.01)
        names = [event.name for event in watch.seen()]
        assert names[:2] == ["STOP", "RESUME"]
        watch.close()
        machine.stop()
        machine.cont()
        assert [event.name for event in watch.seen()] == names


# Pre-flight


def blockers(machine: QemuMachine, mode: Any = "background") -> dict[str, str]:
    return {h.name: h.severity for h in machine.preflight(mode)}


def test_nothing_hinders_a_plain_machine(booted: BareVm) -> None:
    with connect(booted.qmp) as machine:
        took_s: list[float] = []
        for _ in range(10):  # others on the host may take the time of any one
            before = time.monotonic()
            assert machine.preflight() == []
            took_s.append(time.monotonic() - before)
        assert min(took_s) < 0.5, "0.03 s is usual"


IVSHMEM = ["-object", "memory-backend-ram,size=1M,id=iv,share=on", "-device",
           "ivshmem-plain,memdev=iv"]  # fmt: skip
VIRTIO_MEM = ["-m", "64,slots=2,maxmem=1G", "-object", "memory-backend-ram,id=v0,size=256M",
              "-device"]  # fmt: skip
MEMFD = ["-m", "64", "-object", "memory-backend-memfd,id=m0,size=64M,share=on", *MAIN]
HINDERED: dict[str, tuple[list[str], str, str | None, str | None]] = {
    "blocker": ([*IVSHMEM], "migration-blocker", "refuse", "refuse"),
    "incoming": (["-incoming", "defer"], "run-state", "refuse", "refuse"),
    "reporting": (
        [*MEMFD, "-device", "virtio-balloon-pci,free-page-reporting=on"],
        "free-page-reporting", "refuse", "warn",
    ),
    "hinting": (
        [*MEMFD, "-object", "iothread,id=t0", "-device",
         "virtio-balloon-pci,free-page-hint=on,iothread=t0,id=b0"],
        "free-page-hint", "refuse", "warn",
    ),
    "balloon": ([*MEMFD, "-device", "virtio-balloon-pci,id=b0"], "balloon", "warn", "warn"),
    "private-memory": (
        ["-device", "virtio-balloon-pci,free-page-reporting=on"],
        "free-page-reporting", None, None,
    ),
    "virtio-mem": (
        [*VIRTIO_MEM, "virtio-mem-pci,memdev=v0,id=vm0"], "virtio-mem", "warn", "warn",
    ),
    "virtio-mem-changing": (
        [*VIRTIO_MEM, "virtio-mem-pci,memdev=v0,id=vm0,requested-size=64M"],
        "virtio-mem", "refuse", "warn",
    ),
    "file": (["-m", "64", "-mem-path", "{tmp}"], "file-backed-ram", "refuse", None),
    "vhost-user": (
        [*MEMFD, "-chardev", "socket,id=c0,path={tmp}/vu", "-netdev",
         "vhost-user,id=n0,chardev=c0"],
        "vhost-user", "refuse", "warn",
    ),
    "a-name-is-no-vhost-user": (["-netdev", "user,id=vhost-user0"], "vhost-user", None, None),
}  # fmt: skip


def vhost_user_backend(path: Path) -> threading.Thread:
    """Says what QEMU needs to hear from a vhost-user backend before it starts, and no more."""
    listener = socket.socket(socket.AF_UNIX)
    listener.bind(str(path))
    listener.listen(1)

    def serve() -> None:
        with listener, listener.accept()[0] as connection:
            while header := connection.recv(12):
                request, flags, size = struct.unpack("<III", header)
                if size:
                    connection.recv(size)
                wants_answer = request in (1, 11, 15, 17) or flags & 8
                if wants_answer:  # no features, no queues
                    connection.sendall(struct.pack("<IIIQ", request, 5, 8, 0))

    thread = threading.Thread(target=serve, daemon=True)
    thread.start()
    return thread


@pytest.mark.parametrize("kind", HINDERED)
def test_hindrances_are_found(kind: str, tmp_path: Path) -> None:
    arguments, name, background, stop = HINDERED[kind]
    if kind == "vhost-user":
        vhost_user_backend(tmp_path / "vu")
    with (
        BareVm("-S", *(word.format(tmp=tmp_path) for word in arguments)) as vm,
        connect(vm.qmp) as machine,
    ):
        assert blockers(machine).get(name) == background
        assert blockers(machine, "stop").get(name) == stop
        for blocker in machine.preflight():
            assert blocker.reason
            assert blocker.remedy


def test_a_second_process_that_maps_the_ram_is_named() -> None:
    with BareVm("-S", *MEMFD) as vm, connect(vm.qmp) as machine:
        assert blockers(machine) == {}
        (block,) = (b for b in machine.ram_blocks() if b.shared)
        path = f"/proc/{vm.pid}/fd/{block.backing_fd}"
        for access, expected in ((mmap.ACCESS_READ, set()), (mmap.ACCESS_WRITE, {"second-mapper"})):
            ready, tell = os.pipe()
            pid = os.fork()
            if pid == 0:
                with contextlib.suppress(BaseException):
                    fd = os.open(path, os.O_RDWR)
                    mapping = mmap.mmap(fd, 4096, access=access)
                    os.write(tell, b"x")
                    time.sleep(600)
                    mapping.close()
                os._exit(0)
            try:
                assert os.read(ready, 1) == b"x"
                found = machine.preflight()
                assert {h.name for h in found} == expected
                if found:
                    assert str(pid) in found[0].reason
                    assert "m0" in found[0].reason
            finally:
                os.close(ready)
                os.close(tell)
                os.kill(pid, 9)
                os.waitpid(pid, 0)


def crawl(machine: QemuMachine, sink: socket.socket) -> None:
    """Start a migration that takes for ever."""
    machine.qmp.execute("migrate-set-parameters", {"max-bandwidth": 100})
    machine.qmp.execute("migrate", {"uri": f"tcp:127.0.0.1:{sink.getsockname()[1]}"})


def test_a_running_migration_is_refused() -> None:
    with (
        BareVm("-M", "q35", "-m", "64") as vm,
        connect(vm.qmp) as machine,
        socket.create_server(("127.0.0.1", 0)) as sink,
    ):
        time.sleep(BIOS_S)
        crawl(machine, sink)
        assert blockers(machine) == {"migration-running": "busy"}
        machine.qmp.execute("migrate_cancel")
        deadline = time.monotonic() + 60
        while found := blockers(machine):
            assert time.monotonic() < deadline, found
            time.sleep(0.05)
        assert machine.status() == "running"


def test_another_userfaultfd_is_refused() -> None:
    """QEMU's own background snapshot, held up by a sink that does not read, has one."""
    with (
        BareVm("-M", "q35", "-m", "64") as vm,
        connect(vm.qmp) as machine,
        socket.create_server(("127.0.0.1", 0)) as sink,
    ):
        time.sleep(BIOS_S)
        capability = {"capability": "background-snapshot", "state": True}
        try:
            machine.qmp.execute("migrate-set-capabilities", {"capabilities": [capability]})
        except QmpCommandError as error:
            pytest.skip(f"missing uffd-wp: {error.description}")
        crawl(machine, sink)
        deadline = time.monotonic() + 60
        while "userfaultfd" not in (found := blockers(machine)):
            assert time.monotonic() < deadline, found
            time.sleep(0.05)
        assert found["userfaultfd"] == "busy"
