"""The disk's write-back cache, and the block device over it."""

from __future__ import annotations

import errno
import os
import random
from pathlib import Path

import pytest

from stillframe.board.hardware import disk as disk_module
from stillframe.board.hardware.address_space import AddressSpace
from stillframe.board.hardware.block import BUSY, DONE, ERROR, FLUSH, IDLE, READ, WRITE, BlockDevice
from stillframe.board.hardware.disk import CACHE_LIMIT_BYTES, Disk
from stillframe.board.hardware.interrupts import LINE_BLOCK, InterruptLines
from stillframe.board.memory.guest_ram import GuestRam
from stillframe.errors import HostError, MachineError

SECTORS = 1000


@pytest.fixture
def ram() -> GuestRam:
    return GuestRam("test.ram", 4 << 20)


@pytest.fixture
def path(tmp_path: Path) -> Path:
    path = tmp_path / "disk"
    path.write_bytes(random.Random(7).randbytes(SECTORS * 512))
    return path


def test_what_was_written_is_read_whether_cached_or_not(path: Path, ram: GuestRam) -> None:
    expected = bytearray(path.read_bytes())
    disk = Disk(str(path))
    assert disk.sectors == SECTORS
    choose = random.Random(8)
    for _ in range(600):
        sector = choose.randrange(SECTORS)
        count = min(choose.choice((1, 2, 7, 8, 40, 128)), SECTORS - sector)
        place = slice(sector * 512, (sector + count) * 512)
        match choose.randrange(8):
            case 0 | 1 | 2 | 3:
                data = choose.randbytes(count * 512)
                disk.write(sector, data)
                expected[place] = data
                assert disk.dirty_bytes <= CACHE_LIMIT_BYTES
            case 4 | 5 | 6:
                disk.read(sector, count, ram, 5000)
                assert ram.read(5000, count * 512) == expected[place]
            case _:
                disk.drain()
                assert disk.dirty_bytes == 0
                assert path.read_bytes() == expected
    disk.flush()
    disk.close()
    assert path.read_bytes() == expected


def test_a_file_of_an_odd_length_keeps_it(tmp_path: Path) -> None:
    path = tmp_path / "odd"
    path.write_bytes(bytes(3 * 512 + 100))
    disk = Disk(str(path))
    assert disk.sectors == 3
    disk.write(2, b"x" * 512)
    disk.flush()
    assert path.stat().st_size == 3 * 512 + 100
    assert path.read_bytes()[2 * 512 :] == b"x" * 512 + bytes(100)


def test_short_writes_are_completed(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    whole = os.pwritev
    monkeypatch.setattr(
        disk_module.os, "pwritev", lambda fd, parts, at: whole(fd, [parts[0][:700]], at)
    )
    disk = Disk(str(path))
    data = random.Random(9).randbytes(8192)
    disk.write(16, data)
    disk.drain()
    assert path.read_bytes()[16 * 512 : 32 * 512] == data


def test_no_such_disk(tmp_path: Path) -> None:
    with pytest.raises(HostError, match="cannot be opened"):
        Disk(str(tmp_path / "none"))


class Controller:
    """A block device whose thread is the test."""

    def __init__(self, disk: Disk | None, ram: GuestRam) -> None:
        self.disk = disk
        self.lines = InterruptLines(lambda: None)
        space = AddressSpace()
        space.add(0, ram)
        self.kicks = 0
        self.device = BlockDevice(disk, space, self.lines, self._kick)

    def _kick(self) -> None:
        self.kicks += 1

    def command(self, command: int, sector: int = 0, address: int = 0, count: int = 0) -> None:
        for offset, value in (
            (BlockDevice.SECTOR_LOW, sector & 0xFFFFFFFF),
            (BlockDevice.SECTOR_HIGH, sector >> 32),
            (BlockDevice.ADDRESS_LOW, address & 0xFFFFFFFF),
            (BlockDevice.ADDRESS_HIGH, address >> 32),
            (BlockDevice.SECTORS, count),
            (BlockDevice.COMMAND, command),
        ):
            self.device.write_port(offset, 4, value, 0)

    def work(self, *, running: bool = True) -> int:
        """Do all there is to do; gives the pieces."""
        pieces = 0
        while (work := self.device.next_work(running=running)) is not None:
            work()()
            pieces += 1
        return pieces

    def status(self) -> int:
        return self.device.read_port(BlockDevice.STATUS, 4, 0)


@pytest.fixture
def controller(path: Path, ram: GuestRam) -> Controller:
    return Controller(Disk(str(path)), ram)


def test_commands(controller: Controller, path: Path, ram: GuestRam) -> None:
    assert controller.status() == IDLE
    controller.command(READ, 1, 4096, 400)
    assert (controller.status(), controller.kicks) == (BUSY, 1)
    controller.command(WRITE, 0, 0, 1)  # ignored
    assert controller.work() == 4
    assert controller.lines.pending == 1 << LINE_BLOCK
    assert (controller.status(), controller.status()) == (DONE, IDLE)
    assert ram.read(4096, 400 * 512) == path.read_bytes()[512 : 401 * 512]
    ram.write(0, b"new" * 512)
    controller.command(WRITE, 7, 0, 3)
    controller.work()
    assert controller.status() == DONE
    controller.command(FLUSH)
    controller.work()
    assert controller.status() == DONE
    assert path.read_bytes()[7 * 512 : 10 * 512] == b"new" * 512


@pytest.mark.parametrize(
    ("command", "sector", "address", "count"),
    [
        (0, 0, 0, 1),
        (4, 0, 0, 1),
        (READ, 0, 0, 0),
        (READ, 0, 0, 2049),
        (READ, SECTORS, 0, 1),
        (READ, (1 << 64) - 1, 0, 1),
        (WRITE, 0, (4 << 20) - 511, 1),
        (READ, 0, (1 << 64) - 512, 1),
    ],
)
def test_impossible_commands(
    controller: Controller, command: int, sector: int, address: int, count: int
) -> None:
    controller.command(command, sector, address, count)
    assert controller.work() == 0
    assert controller.lines.pending == 1 << LINE_BLOCK
    assert controller.status() == ERROR


def test_without_a_disk(ram: GuestRam) -> None:
    controller = Controller(None, ram)
    assert controller.device.disk_sectors == 0
    controller.command(FLUSH)
    assert controller.status() == ERROR
    controller.device.inactivate()
    controller.device.activate()
    controller.device.close()


def test_a_stop_in_the_middle_goes_on_afterwards(
    controller: Controller, path: Path, ram: GuestRam
) -> None:
    controller.command(READ, 0, 0, 600)
    for _ in range(2):
        work = controller.device.next_work(running=True)
        assert work is not None
        work()()
    assert controller.work(running=False) == 0
    assert controller.device.done_sectors == 256
    assert ram.read(256 * 512, 512) == bytes(512)
    controller.work()
    assert controller.status() == DONE
    assert ram.read(0, 600 * 512) == path.read_bytes()[: 600 * 512]


def test_stopping_writes_the_cache_back(controller: Controller, path: Path, ram: GuestRam) -> None:
    ram.write(0, b"cache" * 1000)
    controller.command(WRITE, 3, 0, 8)
    work = controller.device.next_work(running=True)
    assert work is not None
    work()()
    assert controller.disk is not None
    assert controller.disk.dirty_bytes
    assert controller.work(running=False) == 1
    assert path.read_bytes()[3 * 512 : 11 * 512] == (b"cache" * 1000)[: 8 * 512]


def test_a_reset_drops_what_is_under_way(controller: Controller) -> None:
    controller.command(READ, 0, 0, 600)
    work = controller.device.next_work(running=True)
    assert work is not None
    finish = work()
    controller.device.reset()
    finish()
    assert controller.work() == 0
    assert controller.status() == IDLE
    assert controller.lines.pending == 0


def test_a_disk_that_is_full(
    controller: Controller, ram: GuestRam, path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(fd: int, parts: object, at: int) -> int:
        raise OSError(errno.ENOSPC, "no space left")

    with monkeypatch.context() as patch:
        patch.setattr(disk_module.os, "pwritev", full)
        ram.write(0, b"kept" * 128)
        controller.command(WRITE, 5, 0, 1)
        controller.work()
        assert controller.status() == DONE  # only the cache has it
        assert controller.work(running=False) == 0
        assert controller.device.undrained is not None
        controller.command(FLUSH)
        controller.work()
        assert controller.status() == ERROR
        with pytest.raises(MachineError, match=r"cannot be written.*no space left"):
            controller.device.inactivate()
    controller.device.inactivate()
    assert path.read_bytes()[5 * 512 : 6 * 512] == b"kept" * 128
    assert controller.work() == 0
    controller.device.activate()
    controller.command(READ, 5, 8192, 1)
    controller.work()
    assert controller.status() == DONE
    assert ram.read(8192, 4) == b"kept"
