"""QEMUs in each of the run states that a guest or its user can bring about."""

from __future__ import annotations

import contextlib
import json
import socket
import time
from collections.abc import Iterator
from pathlib import Path

from stillframe.qmp.client import QmpClient
from tests.support.bare_vm import BareVm

TIMEOUT_S = 60.0


def boot_sector(code: bytes) -> bytes:
    """A disk whose boot sector does this, and then stands still."""
    halt = bytes.fromhex("f4 ebfd")  # hlt; jmp to it
    return (code + halt).ljust(510, b"\0") + b"\x55\xaa" + bytes(1 << 20)


def out(port: int, value: int, *, word: bool = False) -> bytes:
    """``out`` of a byte or a word."""
    load = b"\xb8" + value.to_bytes(2, "little") if word else b"\xb0" + bytes([value])
    return b"\xba" + port.to_bytes(2, "little") + load + (b"\xef" if word else b"\xee")


_PM1_CONTROL = 0x604  # as SeaBIOS sets it up (pc and q35)
_CODE = {
    "running": b"",
    "suspended": out(_PM1_CONTROL, 0x2400, word=True),  # SLP_EN, SLP_TYP 1: S3
    "shutdown": out(_PM1_CONTROL, 0x2000, word=True),  # SLP_EN, SLP_TYP 0: soft off
    "guest-panicked": out(0x505, 1),
    "watchdog": out(0x443, 0xF),  # ib700: 0 seconds
}
_ARGUMENTS = {
    "shutdown": ["-no-shutdown"],
    "guest-panicked": ["-device", "pvpanic", "-action", "panic=pause"],
    "watchdog": ["-device", "ib700", "-action", "watchdog=pause"],
    "prelaunch": ["-S"],
}
_FAILING_DISK = {
    "driver": "blkdebug",
    "node-name": "d0",
    "image": {"driver": "null-co", "size": 1 << 20, "read-zeroes": True},
    "inject-error": [{"event": "none", "errno": 5}],
}
STATES = (*_CODE, "prelaunch", "paused", "io-error", "debug")


@contextlib.contextmanager
def vm_in_state(state: str, directory: Path, *, machine: str = "pc") -> Iterator[BareVm]:
    """A QEMU that has reached ``state``; its first monitor is free."""
    arguments = ["-M", machine, "-m", "64", *_ARGUMENTS.get(state, [])]
    if state in _CODE:
        disk = directory / "boot.img"
        disk.write_bytes(boot_sector(_CODE[state]))
        arguments += ["-drive", f"file={disk},format=raw,if=ide"]
    if state == "io-error":
        arguments += ["-blockdev", json.dumps(_FAILING_DISK)]
        arguments += ["-device", "ide-hd,drive=d0,rerror=stop"]
    if state == "debug":
        arguments += ["-gdb", f"unix:{directory}/gdb,server=on,wait=off"]
    with contextlib.ExitStack() as stack:
        vm = stack.enter_context(BareVm(*arguments))
        if state == "debug":
            gdb = stack.enter_context(contextlib.closing(socket.socket(socket.AF_UNIX)))
            _connect(gdb, directory / "gdb")
            gdb.sendall(b"+$s#73")
        with QmpClient.connect(vm.second_qmp, timeout_s=60) as qmp:
            if state == "paused":
                qmp.execute("stop")
            wait_state(qmp, state)
        if state == "running":
            time.sleep(1)
        yield vm


def _connect(gdb: socket.socket, path: Path) -> None:
    deadline = time.monotonic() + TIMEOUT_S
    while True:
        try:
            gdb.connect(str(path))
            return
        except (FileNotFoundError, ConnectionRefusedError):
            assert time.monotonic() < deadline
            time.sleep(0.02)


def state_of(qmp: QmpClient) -> str:
    reply = qmp.execute("query-status")
    assert isinstance(reply, dict)
    return str(reply["status"])


def wait_state(qmp: QmpClient, state: str) -> None:
    deadline = time.monotonic() + TIMEOUT_S
    while state_of(qmp) != state:
        assert time.monotonic() < deadline, f"the VM is {state_of(qmp)}, not {state}"
        time.sleep(0.05)
