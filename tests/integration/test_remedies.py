"""Refusals of ``take`` and what they say to do about it: each remedy is carried out, and helps."""

from __future__ import annotations

import contextlib
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from stillframe.errors import BusyError, HostError, NotFoundError, RefusedError, UsageError
from stillframe.machine.finding import connect
from stillframe.machine.process.machine import ProcessMachine
from stillframe.qmp.client import QmpClient
from tests.support.bare_vm import BareVm
from tests.support.probes import has_uffd_wp
from tests.support.round_trip import take_machine
from tests.support.waiting import wait_until

pytestmark = pytest.mark.qemu


def take(machine: ProcessMachine, directory: Path, **options: str) -> None:
    """Take one snapshot; it must work."""
    take_machine(machine, directory / f"{time.monotonic_ns()}.still", **options)


def refusal(machine: ProcessMachine, directory: Path) -> RefusedError:
    has_uffd_wp().require()
    with pytest.raises(RefusedError) as refused:
        take(machine, directory)
    assert refused.value.guest_state == "running"
    assert refused.value.remedy is not None
    return refused.value


MEMFD = (
    "-m",
    "64",
    "-object",
    "memory-backend-memfd,id=ram,size=64M,share=on",
    "-M",
    "pc,memory-backend=ram",
)


def test_free_page_reporting_and_the_other_mode(tmp_path: Path) -> None:
    with (
        BareVm(*MEMFD, "-device", "virtio-balloon-pci,free-page-reporting=on") as vm,
        connect(vm.qmp) as machine,
    ):
        assert "--mode stop" in (refusal(machine, tmp_path).remedy or "")
        take(machine, tmp_path, mode="stop")
    with BareVm("-m", "64", "-device", "virtio-balloon-pci") as vm, connect(vm.qmp) as machine:
        take(machine, tmp_path)


VIRTIO_MEM = (
    "-m",
    "64,maxmem=1G",
    "-object",
    "memory-backend-ram,id=vm,size=256M",
    "-device",
    "virtio-mem-pci,id=vm0,memdev=vm,requested-size=128M",
)


@pytest.mark.parametrize("how", ["request", "stop"])
def test_virtio_mem_that_is_changing_its_size(tmp_path: Path, how: str) -> None:
    with BareVm("-M", "q35", *VIRTIO_MEM) as vm, connect(vm.qmp) as machine:
        remedy = refusal(machine, tmp_path).remedy or ""
        if how == "stop":
            assert "--mode stop" in remedy
            take(machine, tmp_path, mode="stop")
        else:
            assert "request the one that it has" in remedy
            where = {"path": "/machine/peripheral/vm0", "property": "requested-size"}
            machine.qmp.execute("qom-set", {**where, "value": 0})
            take(machine, tmp_path)


def test_ram_in_a_file_on_a_disk(tmp_path: Path) -> None:
    back_end = f"memory-backend-file,id=r,size=64M,mem-path={tmp_path}/ram,share=on"
    options = ("-m", "64", "-object", back_end, "-machine", "memory-backend=r")
    with BareVm(*options) as vm, connect(vm.qmp) as machine:
        kinds = {block.backing for block in machine.ram_blocks()}
        if "file" not in kinds:
            pytest.skip("missing disk: the temporary directory is on tmpfs")
        assert "--mode stop" in (refusal(machine, tmp_path).remedy or "")
        take(machine, tmp_path, mode="stop")
    with BareVm("-m", "64") as vm, connect(vm.qmp) as machine:
        take(machine, tmp_path)


@contextlib.contextmanager
def other_writer(path: Path) -> Iterator[subprocess.Popen[bytes]]:
    code = f"import mmap,os,time;m=mmap.mmap(os.open({str(path)!r},os.O_RDWR),0);print(flush=True);"
    writer = subprocess.Popen(
        [sys.executable, "-c", f"{code}time.sleep(600)"], stdout=subprocess.PIPE
    )
    try:
        assert writer.stdout is not None
        writer.stdout.readline()
        yield writer
    finally:
        writer.kill()
        writer.wait()


def test_a_second_process_that_can_write_the_ram(tmp_path: Path) -> None:
    path = Path(f"/dev/shm/remedy-{os.getpid()}")
    back_end = f"memory-backend-file,id=r,size=64M,mem-path={path},share=on"
    try:
        with (
            BareVm("-m", "64", "-object", back_end, "-machine", "memory-backend=r") as vm,
            connect(vm.qmp) as machine,
            other_writer(path) as writer,
        ):
            error = refusal(machine, tmp_path)
            assert f"process {writer.pid} (" in str(error)
            assert "end that process" in (error.remedy or "")
            take(machine, tmp_path, mode="stop")
            os.kill(writer.pid, signal.SIGKILL)
            writer.wait()
            take(machine, tmp_path)
    finally:
        path.unlink(missing_ok=True)


def test_somebody_else_watches_the_ram(tmp_path: Path) -> None:
    with BareVm("-m", "64") as vm, connect(vm.qmp) as machine:
        with machine.open_write_protection() as uffd:
            block = machine.ram_blocks()[0]
            uffd.register(block.hva, block.used_length_bytes)
            with pytest.raises((RefusedError, BusyError)) as refused:
                take(machine, tmp_path)
            assert "wait until it is done" in (refused.value.remedy or "")
        take(machine, tmp_path)


@contextlib.contextmanager
def tracer(pid: int) -> Iterator[subprocess.Popen[bytes]]:
    """strace, or what it does, on the VM's first thread."""
    program = shutil.which("strace")
    if program:
        words = [program, "-f", "-o", "/dev/null", "-p", str(pid)]
    else:
        words = [sys.executable, "-c", TRACE, str(pid)]
    process = subprocess.Popen(words, stderr=subprocess.DEVNULL)
    try:
        wait_until(
            lambda: f"TracerPid:\t{process.pid}\n" in Path(f"/proc/{pid}/status").read_text()
        )
        yield process
    finally:
        process.terminate()
        process.wait()


TRACE = """
import ctypes, sys, time
ctypes.CDLL(None).ptrace(0x4206, int(sys.argv[1]), None, None)
time.sleep(600)
"""


def test_a_tracer_is_named(tmp_path: Path) -> None:
    with BareVm("-m", "64") as vm, connect(vm.qmp) as machine:
        with tracer(vm.pid) as process:
            name = Path(f"/proc/{process.pid}/comm").read_text().strip()
            with pytest.raises(HostError) as refused:
                take(machine, tmp_path)
            assert f"process {process.pid} ({name}) traces the VM" in str(refused.value)
            assert "--mode stop" in (refused.value.remedy or "")
            with pytest.raises(HostError, match="traces the VM"):
                machine.check_right()
            take(machine, tmp_path, mode="stop")
        take(machine, tmp_path)


@pytest.mark.parametrize("by", ["path", "pid"])
def test_a_debugger_that_holds_the_vm_is_named(tmp_path: Path, by: str) -> None:
    if shutil.which("gdb") is None:
        pytest.skip("missing gdb: no such program")
    with BareVm("-m", "64") as vm:
        ref = vm.qmp if by == "path" else str(vm.pid)
        gdb = subprocess.Popen(
            ["gdb", "-q", "-nx", "-p", str(vm.pid)],
            stdin=subprocess.PIPE,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
        )
        try:
            wait_until(lambda: "tracing stop" in Path(f"/proc/{vm.pid}/status").read_text())
            with pytest.raises(HostError, match=rf"process {gdb.pid} \(gdb\) traces") as refused:
                connect(ref, timeout_s=1.0)
            assert "--mode stop" not in (refused.value.remedy or "")
        finally:
            gdb.communicate(b"detach\nquit\n", timeout=60)
        with connect(ref) as machine:
            take(machine, tmp_path)


def test_a_stopped_process_is_let_go_on(tmp_path: Path) -> None:
    with BareVm("-m", "64") as vm:
        os.kill(vm.pid, signal.SIGSTOP)
        with pytest.raises(HostError, match="was sent SIGSTOP") as refused:
            connect(vm.qmp, timeout_s=1.0)
        command = re.search(r"kill -CONT \d+", refused.value.remedy or "")
        assert command is not None
        subprocess.run(command[0].split(), check=True)
        with connect(vm.qmp) as machine:
            take(machine, tmp_path)


def test_a_busy_monitor_and_a_second_one(tmp_path: Path) -> None:
    with BareVm("-m", "64") as vm, QmpClient.connect(vm.qmp) as other:
        with pytest.raises(BusyError, match="in use") as busy:
            connect(vm.qmp, timeout_s=1.0)
        assert "second -qmp socket, or stop the other client" in (busy.value.remedy or "")
        with connect(vm.second_qmp) as machine:
            take(machine, tmp_path)
        other.close()
        with connect(vm.qmp) as machine:
            take(machine, tmp_path)


def test_two_vms_of_one_name() -> None:
    twin = f"twin-{os.getpid()}"
    with BareVm("-m", "64", name=twin) as first, BareVm("-m", "64", name=twin) as second:
        with pytest.raises(UsageError, match="2 VMs are called") as refused:
            connect(twin)
        pids = re.findall(r"\d+", refused.value.remedy or "")
        assert sorted(map(int, pids)) == sorted([first.pid, second.pid])
        with connect(pids[0]) as machine:
            assert machine.pid in (first.pid, second.pid)


def test_a_name_that_nobody_has() -> None:
    here = f"here-{os.getpid()}"
    with BareVm("-m", "64", name=here) as vm:
        with pytest.raises(NotFoundError) as refused:
            connect("nowhere")
        words = re.search(r"'stillframe (\w+)'", refused.value.remedy or "")
        assert words is not None
        listed = subprocess.run(
            [sys.executable, "-m", "stillframe", words[1]],
            capture_output=True,
            text=True,
            check=True,
        )
        assert re.search(rf"\b{vm.pid} +{here}\b", listed.stdout)
