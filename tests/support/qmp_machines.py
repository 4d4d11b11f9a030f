"""A QEMU and a board that are alike as far as QMP can tell: stopped, with a disk and a display."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from pathlib import Path

from stillframe.board.hardware.config import BoardConfig
from stillframe.board.migration.host import start_host
from tests.support.bare_vm import BareVm
from tests.support.tiny_guest import write_guest

RAM_BYTES = 64 << 20
DISK_BYTES = 1 << 20
VCPUS = 2
NAME = "vm"


def make_disk(directory: Path) -> Path:
    """A raw disk of zeros."""
    path = directory / "disk.img"
    path.write_bytes(bytes(DISK_BYTES))
    return path


@contextlib.contextmanager
def board_monitor(directory: Path, disk: Path) -> Iterator[str]:
    """A board in prelaunch; gives its monitor's path."""
    config = BoardConfig(
        name=NAME,
        guest_path=write_guest(directory / "guest.elf"),
        ram_bytes=RAM_BYTES,
        vcpus=VCPUS,
        disk_path=str(disk),
    )
    path = str(directory / "qmp")
    with start_host(config, qmp=path, paused=True):
        yield path


@contextlib.contextmanager
def qemu_monitor(disk: Path) -> Iterator[str]:
    """A QEMU in prelaunch; gives its monitor's path."""
    with BareVm(
        *("-machine", "q35", "-nodefaults", "-S", "-smp", str(VCPUS)),
        *("-m", f"size={RAM_BYTES >> 20}M,slots=1,maxmem=1G", "-device", "VGA"),
        *("-drive", f"file={disk},format=raw,if=none,id=disk0,file.locking=off"),
        *("-device", "virtio-blk-pci,drive=disk0"),
        name=NAME,
    ) as vm:
        yield vm.qmp
