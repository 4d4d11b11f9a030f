"""Boards with a ledger and DMA that are snapshotted again and again, from inside or outside.

What a device reads back from the disk must be of the instant as well, so the disk is copied when
the board has stopped.
"""

from __future__ import annotations

import re
import shutil
import subprocess
import sys
import time
from collections.abc import Callable
from contextlib import ExitStack
from pathlib import Path
from typing import Any, BinaryIO, Protocol, cast

import msgspec

from guests.serial import SerialConsole
from stillframe import api
from stillframe.board.guests import guest_path
from stillframe.board.hardware.board import Board
from stillframe.board.hardware.config import BoardConfig
from stillframe.board.memory.own_protection import Preference
from stillframe.board.migration.host import start_host
from stillframe.errors import MachineError, SnapshotCancelled
from stillframe.qmp.client import QmpClient
from stillframe.store import open_snapshot
from stillframe.vmstate.reader import StreamReader
from stillframe.vmstate.records import Pages, RamBlocks
from tests.support.probes import has_uffd_wp

WAYS = ("userfaultfd", "mprotect", "outside")
"""How a snapshot is taken: from inside with one or the other protection, or from outside."""
TIMEOUT_S = 60.0
RAM_BYTES = 32 << 20
DISK_BYTES = 512 << 10
_TICK_MS = 50
_REPOSITORY = Path(__file__).resolve().parents[2]


class LedgerKind(msgspec.Struct, frozen=True):
    """What is to be snapshotted. ``rate_mib_per_s`` 0 is full speed."""

    vcpus: int = 2
    rate_mib_per_s: int = 0


def ledger_config(kind: LedgerKind, directory: Path, disk: Path) -> BoardConfig:
    """A board; its serial line is in ``directory``: see ``serial_line``."""
    return BoardConfig(
        name="ledger",
        guest_path=str(guest_path("ledger")),
        command_line=f"rate={kind.rate_mib_per_s} dma=all dma_us=1000 tick_ms={_TICK_MS}",
        ram_bytes=RAM_BYTES,
        vcpus=kind.vcpus,
        disk_path=str(disk),
        display_width=64,
        display_height=64,
        serial=f"unix:{directory / 'serial'}",
    )


def serial_line(stack: ExitStack, directory: Path) -> SerialConsole:
    """Connected to the board of ``ledger_config``, until ``stack`` ends it."""
    console = SerialConsole(directory / "serial")
    stack.callback(console.close)
    return console


def audit_over(
    console: SerialConsole,
    runs: Callable[[], bool] = lambda: True,
    *,
    timeout_s: float = TIMEOUT_S,
) -> str:
    """What the guest's own audit says, or that it does not answer.

    Args:
        runs: whether the guest can still answer: one that is torn may panic as well.
    """
    start = console.mark()
    console.send("a")
    deadline = time.monotonic() + timeout_s
    while runs() and time.monotonic() < deadline:
        try:
            return console.wait_line("^AUDIT ", timeout_s=0.2, since=start)
        except MachineError:
            continue
    return f"the guest does not answer; it said {console.lines(start)[-1:]}"


def keep_disk_of_stop(board: Board, copy: Path) -> None:
    """Copy the board's disk each time that it stops: nobody writes to it then."""
    disk = board.config.disk_path
    assert disk is not None

    def copy_disk(event: str, data: dict[str, object]) -> None:
        if event == "STOP":
            shutil.copyfile(disk, copy)

    board.add_listener(copy_disk)


class LedgerSource(Protocol):
    """A board whose ledger is at work.

    ``disk_at_stop``: the disk as it was when the board last stopped.
    """

    kind: LedgerKind
    disk_at_stop: Path

    def snapshot(self, file: Path) -> dict[str, Any]:
        """Take a background snapshot of it; the job's statistics."""
        ...

    def ram(self, file: Path) -> bytes | bytearray:
        """``board.ram`` as the file of a snapshot holds it."""
        ...

    def cancelled_snapshot(self, file: Path, after_s: float) -> bool:
        """Begin one, and cancel it after a while; whether that was in time."""
        ...

    def pause(self) -> None:
        """Leave the processors to others."""
        ...

    def go_on(self) -> None:
        """After a pause."""
        ...

    def audit(self) -> str:
        """What the guest's own audit says."""
        ...


def _new_disk(directory: Path) -> Path:
    disk = directory / "disk"
    disk.write_bytes(bytes(DISK_BYTES))
    return disk


def _ram_of_stream(stream: BinaryIO) -> bytearray:
    image = bytearray(RAM_BYTES)
    number = -1
    for event in StreamReader(stream).events():
        if isinstance(event, RamBlocks):
            number = [block.idstr for block in event.blocks].index("board.ram")
        elif isinstance(event, Pages) and event.block_index == number:
            image[event.offset_bytes : event.offset_bytes + len(event.data)] = event.data
    return image


class InsideSource:
    """A board of this process, which snapshots itself (``migrate``).

    Args:
        stack: ends it.
        directory: its own.
    """

    def __init__(
        self, stack: ExitStack, directory: Path, kind: LedgerKind, *, protection: Preference
    ) -> None:
        self.kind = kind
        self.disk_at_stop = directory / "disk-at-stop"
        config = ledger_config(kind, directory, _new_disk(directory))
        host = stack.enter_context(start_host(config, paused=True, protection_prefer=protection))
        self._board, self._migration = host.board, host.migration
        self._console = serial_line(stack, directory)
        keep_disk_of_stop(self._board, self.disk_at_stop)
        self._migration.set_capabilities({"background-snapshot": True})
        self.go_on()
        self._console.wait_line("^ledger ready", timeout_s=TIMEOUT_S)

    def snapshot(self, file: Path) -> dict[str, Any]:
        self._migration.migrate(f"file:{file}")
        assert self._migration.wait(TIMEOUT_S), "the snapshot does not end"
        statistics = self._migration.query()["x-stillframe"]
        return cast(dict[str, Any], statistics)

    def ram(self, file: Path) -> bytearray:
        with file.open("rb") as stream:
            return _ram_of_stream(stream)

    def cancelled_snapshot(self, file: Path, after_s: float) -> bool:
        self._migration.migrate(f"file:{file}")
        time.sleep(after_s)
        self._migration.cancel()
        assert self._migration.wait(TIMEOUT_S), "the snapshot does not end"
        return self._migration.query()["status"] == "cancelled"

    def pause(self) -> None:
        self._board.stop()

    def go_on(self) -> None:
        self._board.cont()

    def audit(self) -> str:
        return audit_over(self._console)


class OutsideSource:
    """A board of another process; snapshots are taken from this one.

    Args:
        stack: ends it.
        directory: its own.
    """

    def __init__(self, stack: ExitStack, directory: Path, kind: LedgerKind) -> None:
        self.kind = kind
        self.disk_at_stop = directory / "disk-at-stop"
        self.qmp_path = directory / "qmp"
        config = ledger_config(kind, directory, _new_disk(directory))
        words = [msgspec.json.encode(config).decode(), self.qmp_path, self.disk_at_stop]
        process = subprocess.Popen(
            [sys.executable, "-m", "tests.support.ledger_board", *map(str, words)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            cwd=_REPOSITORY,
        )
        stack.enter_context(process)
        stack.callback(process.kill)
        assert process.stdout is not None
        assert process.stdout.readline() == "ready\n"
        self._console = serial_line(stack, directory)
        self._qmp = stack.enter_context(QmpClient.connect(str(self.qmp_path)))
        self.go_on()
        self._console.wait_line("^ledger ready", timeout_s=TIMEOUT_S)

    def snapshot(self, file: Path) -> dict[str, Any]:
        taken = api.take(str(self.qmp_path), file).wait(TIMEOUT_S)
        return cast(dict[str, Any], msgspec.to_builtins(taken.statistics))

    def ram(self, file: Path) -> bytes:
        with open_snapshot(file) as snapshot:
            return snapshot.read_range("board.ram", 0, RAM_BYTES)

    def cancelled_snapshot(self, file: Path, after_s: float) -> bool:
        job = api.take(str(self.qmp_path), file)
        time.sleep(after_s)
        job.cancel()
        try:
            job.wait(TIMEOUT_S)
        except SnapshotCancelled:
            return True
        return False

    def pause(self) -> None:
        self._qmp.execute("stop")

    def go_on(self) -> None:
        self._qmp.execute("cont")

    def audit(self) -> str:
        return audit_over(self._console)

    def is_progressing(self, within_s: float = 60.0) -> bool:
        """Whether money is seen to move within that time."""
        deadline = time.monotonic() + within_s
        start = self._console.mark()
        while time.monotonic() < deadline:
            ticks = "\n".join(self._console.lines(start))
            if len(set(re.findall(r"^tick .*transfers=(\d+)", ticks, re.MULTILINE))) > 1:
                return True
            time.sleep(0.005)
        return False


def start_source(stack: ExitStack, directory: Path, way: str, kind: LedgerKind) -> LedgerSource:
    """A source that is snapshotted in one of ``WAYS``; ``stack`` ends it."""
    if way != "mprotect":
        has_uffd_wp().require()
    place = directory / "source"
    place.mkdir()
    if way == "outside":
        return OutsideSource(stack, place, kind)
    return InsideSource(stack, place, kind, protection=cast(Preference, way))
