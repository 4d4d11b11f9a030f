"""Clients that were made for QEMU drive a board: our own outside code, qemu.qmp and qmp-shell."""

from __future__ import annotations

import asyncio
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from stillframe.board.hardware.config import BoardConfig
from stillframe.board.migration.host import BoardHost, start_host
from stillframe.machine.process.vm_info import VmInfo
from stillframe.machine.qemu.machine import QemuMachine
from stillframe.qmp.client import QmpClient
from stillframe.vmstate.devices import split_device_state
from tests.support.tiny_guest import IDLE, write_guest

RAM_BYTES = 16 << 20


@pytest.fixture
def host(tmp_path: Path) -> Iterator[BoardHost]:
    (tmp_path / "disk").write_bytes(bytes(1 << 20))
    config = BoardConfig(
        name="driven",
        guest_path=write_guest(tmp_path / "guest.elf"),
        ram_bytes=RAM_BYTES,
        vcpus=2,
        disk_path=str(tmp_path / "disk"),
    )
    with start_host(config, qmp=str(tmp_path / "qmp")) as one:
        yield one


def address(host: BoardHost) -> str:
    assert isinstance(host.qmp_address, str)
    return host.qmp_address


@pytest.fixture
def machine(host: BoardHost) -> Iterator[QemuMachine]:
    """The code that looks at a running QEMU, with a board in its place."""
    path = address(host)
    info = VmInfo(
        pid=os.getpid(),
        started_s=0.0,
        uid=os.geteuid(),
        name="driven",
        executable=sys.executable,
        argv=(),
        accelerator="unicorn",
        ram_bytes=RAM_BYTES,
        qmp_addresses=(path,),
    )
    with QemuMachine(info, QmpClient.connect(path)) as one:
        yield one


def test_what_our_outside_code_reads(host: BoardHost, machine: QemuMachine) -> None:
    record = machine.describe()
    assert record.machine_type == "stillframe-board-1"
    assert (record.name, record.accelerator, record.vcpus) == ("driven", "unicorn", 2)
    assert record.guest_state == "running"
    (disk,) = record.disks
    assert (disk.device, disk.driver, disk.read_only) == ("disk0", "raw", False)
    assert disk.filename == host.board.config.disk_path
    blocks = machine.ram_blocks()
    assert [block.idstr for block in blocks] == ["board.ram", "board.vram"]
    ours = {block.idstr: block for block in host.board.ram_blocks()}
    for block in blocks:
        own = ours[block.idstr]
        assert (block.hva, block.used_length_bytes) == (own.hva, own.used_length_bytes)
        assert (block.max_length_bytes, block.page_size_bytes) == (own.max_length_bytes, 4096)
        assert (block.backing, block.shared, block.readonly) == ("memfd", True, False)
    assert machine.memory_map(blocks) == host.board.memory_map()
    assert [h.name for h in machine.preflight() if h.severity == "refuse"] == []


def test_a_dimm_is_seen(host: BoardHost, machine: QemuMachine) -> None:
    before = machine.blocks_signature()
    machine.qmp.execute(
        "object-add", {"qom-type": "memory-backend-ram", "id": "m0", "size": 2 << 20}
    )
    machine.qmp.execute("device_add", {"driver": "pc-dimm", "id": "d0", "memdev": "m0"})
    assert machine.blocks_signature() != before
    blocks = machine.ram_blocks()
    assert [block.idstr for block in blocks] == ["board.ram", "board.vram", "board.dimm0"]
    assert machine.memory_map(blocks)[-1].gpa == 1 << 32
    assert [h.name for h in machine.preflight() if h.severity == "refuse"] == []


def test_the_downtime_as_our_outside_code_has_it(host: BoardHost, machine: QemuMachine) -> None:
    """stop, device state into a memfd, cont: each announced while the one before is carried out."""
    watch = machine.watch()
    assert machine.preflight(moment="stop") == []
    machine.prepare_device_state()
    for _ in range(3):
        machine.stop()
        assert machine.status() == "paused"
        state = machine.save_device_state()
        machine.cont()
        assert machine.status() == "running"
        idstrs = [section.idstr for section in split_device_state(state)]
        assert "globalstate" in idstrs
        assert "ram" not in idstrs
    machine.finish_device_state()
    assert [event.name for event in watch.seen()] == ["STOP", "RESUME"] * 3
    watch.close()
    assert machine.qmp.execute("query-fdsets") == []


def test_reading_guest_memory(host: BoardHost, machine: QemuMachine, tmp_path: Path) -> None:
    path = tmp_path / "memory"
    machine.qmp.execute("pmemsave", {"val": 0x100000, "size": 3, "filename": str(path)})
    assert path.read_bytes() == IDLE


def qmp_package() -> Any:
    return pytest.importorskip("qemu.qmp", reason="missing qemu-qmp: the package qemu.qmp")


def test_the_qemu_qmp_package(host: BoardHost) -> None:
    package = qmp_package()

    async def drive() -> list[str]:
        client = package.QMPClient("test")
        heard: list[str] = []
        await client.connect(address(host))
        with client.listener() as listener:
            assert (await client.execute("query-status"))["status"] == "running"
            await client.execute("stop")
            await client.execute("cont")
            await client.execute("system_reset")
            # Several at once, each with an id of its own.
            names = await asyncio.gather(*(client.execute("query-name") for _ in range(5)))
            assert names == [{"name": "driven"}] * 5
            with pytest.raises(package.ExecuteError) as caught:
                await client.execute("screendump", {"filename": 5})
            assert caught.value.error_class == "GenericError"
            assert "expected: string" in str(caught.value.error)
            while len(heard) < 3:
                heard.append((await listener.get())["event"])
        await client.execute("quit")
        await client.disconnect()
        return heard

    assert asyncio.run(asyncio.wait_for(drive(), 60)) == ["STOP", "RESUME", "RESET"]
    assert host.wait(60)


def test_the_legacy_interface_of_the_package(host: BoardHost, tmp_path: Path) -> None:
    qmp_package()
    from qemu.qmp.legacy import QEMUMonitorProtocol

    monitor = QEMUMonitorProtocol(address(host))
    assert monitor.connect()["QMP"]["version"]["package"].startswith("stillframe")
    assert monitor.cmd("query-kvm") == {"enabled": False, "present": False}
    memfd = os.memfd_create("handed over")
    monitor.send_fd_scm(memfd)
    monitor.cmd("getfd", fdname="mine")
    monitor.cmd("closefd", fdname="mine")
    os.close(memfd)
    monitor.cmd("stop")
    assert monitor.pull_event(wait=60)["event"] == "STOP"
    monitor.close()


def test_qmp_shell(host: BoardHost, tmp_path: Path) -> None:
    qmp_package()
    picture = tmp_path / "picture.png"
    said = subprocess.run(
        [sys.executable, "-m", "qemu.qmp.qmp_shell", address(host)],
        input=f"query-status\nstop\nscreendump filename={picture} format=png\nnosuch a=1\ncont\n",
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert "Connected to QEMU" in said.stdout, said.stderr
    assert '"status": "running"' in said.stdout
    assert "The command nosuch has not been found" in said.stdout
    assert picture.read_bytes()[:4] == b"\x89PNG"
    assert host.board.run_state == "running"


def test_hmp_through_qmp_shell(host: BoardHost) -> None:
    qmp_package()
    said = subprocess.run(
        [sys.executable, "-m", "qemu.qmp.qmp_shell", "-H", address(host)],
        input="info status\ninfo ramblock\n",
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert "VM status: running" in said.stdout, said.stderr
    assert "board.vram" in said.stdout
