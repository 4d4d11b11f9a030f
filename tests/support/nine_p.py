"""A guest that mounts a 9p file system, played through QEMU's test protocol.

Debian's kernel for the cloud has no 9p, and for QEMU a mount is but an attached root fid. So this
drives a ``virtio-9p-pci`` device as a legacy driver would, by port I/O and in the guest's RAM.
Sources: QEMU ``softmmu/qtest.c`` (the protocol), ``hw/9pfs/9p.c``; virtio 1.1, section 2.6 (split
queues) and 4.1.4.8 (legacy interface); 9P2000.L.
"""

from __future__ import annotations

import socket
import struct
import time
from pathlib import Path
from typing import Any

from guests.monitor import qmp_execute
from tests.support.waiting import wait_until

ARGUMENTS = (
    "-M",
    "pc",
    "-device",
    "virtio-9p-pci,fsdev=f,mount_tag=host,addr=10.0,disable-modern=on",
)
_SLOT = 0x10
_QUEUE, _TO, _FROM = 0x2000000, 0x2100000, 0x2110000
"""Guest-physical addresses, of RAM that the BIOS leaves alone."""
_NEXT, _WRITE = 1, 2
_VERSION, _ATTACH, _CLUNK = 100, 104, 120
_NO_TAG, _NO_FID = 0xFFFF, 0xFFFFFFFF


class NinePGuest:
    """``socket_path``: of ``-qtest unix:...,server=on,wait=off``; ``monitor``: a free one."""

    def __init__(self, socket_path: Path, monitor: Path) -> None:
        self._link = socket.socket(socket.AF_UNIX)
        self._link.connect(str(socket_path))
        self._lines = self._link.makefile("rw")
        self._sent = 0
        self._base = _io_base(monitor)
        self._out("b", 18, 0)
        self._out("b", 18, 3)  # acknowledged, driver
        self._out("l", 4, 0)
        self._out("w", 14, 0)
        self._size = int(self._ask(f"inw {self._base + 12:#x}"), 16)
        self._write(_QUEUE, bytes(3 * 4096 + 16 * self._size))
        self._out("l", 8, _QUEUE >> 12)
        self._out("b", 18, 7)

    def mount(self) -> None:
        self._call(_VERSION, _NO_TAG, struct.pack("<I", 8192) + _text("9P2000.L"))
        user = _text("root") + _text("") + struct.pack("<I", 0)
        self._call(_ATTACH, 0, struct.pack("<II", 0, _NO_FID) + user)

    def unmount(self) -> None:
        self._call(_CLUNK, 0, struct.pack("<I", 0))

    def close(self) -> None:
        self._lines.close()
        self._link.close()

    def _ask(self, line: str) -> str:
        self._lines.write(f"{line}\n")
        self._lines.flush()
        while (answer := self._lines.readline()).startswith("IRQ"):
            pass
        assert answer.startswith("OK"), answer
        return answer[2:].strip()

    def _out(self, width: str, register: int, value: int) -> None:
        self._ask(f"out{width} {self._base + register:#x} {value:#x}")

    def _write(self, gpa: int, data: bytes) -> None:
        self._ask(f"write {gpa:#x} {len(data)} 0x{data.hex()}")

    def _read(self, gpa: int, length: int) -> bytes:
        return bytes.fromhex(self._ask(f"read {gpa:#x} {length}").removeprefix("0x"))

    def _call(self, kind: int, tag: int, body: bytes) -> None:
        message = struct.pack("<IBH", 7 + len(body), kind, tag) + body
        self._write(_TO, message)
        self._write(_QUEUE, struct.pack("<QIHH", _TO, len(message), _NEXT, 1))
        self._write(_QUEUE + 16, struct.pack("<QIHH", _FROM, 4096, _WRITE, 0))
        available = _QUEUE + 16 * self._size
        self._write(available + 4 + 2 * (self._sent % self._size), struct.pack("<H", 0))
        self._sent += 1
        self._write(available + 2, struct.pack("<H", self._sent))
        self._out("w", 16, 0)
        used = (available + 6 + 2 * self._size + 4095) & ~4095
        deadline_s = time.monotonic() + 60
        while struct.unpack("<H", self._read(used + 2, 2))[0] != self._sent:
            assert time.monotonic() < deadline_s, "no answer from the device"
            time.sleep(0.01)
        assert self._read(_FROM, 5)[4] == kind + 1


def _io_base(monitor: Path) -> int:
    """Where the BIOS has put the device's ports, once it has switched them on.

    By the monitor: who looks by port I/O is in the way of the BIOS, which does the same.
    """
    found: list[int] = []

    def is_mapped() -> bool:
        buses: Any = qmp_execute(monitor, "query-pci")
        (device,) = (one for one in buses[0]["devices"] if one["slot"] == _SLOT)
        found.extend(
            region["address"]
            for region in device["regions"]
            if region["type"] == "io" and region["address"] > 0
        )
        return bool(found)

    wait_until(is_mapped, "the BIOS does not map it")
    return found[0]


def _text(text: str) -> bytes:
    return struct.pack("<H", len(text)) + text.encode()
