"""A QMP server with a few commands, for the tests of the server."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Annotated, Literal

import msgspec
import pytest

from stillframe.board.monitor.arguments import Uint64
from stillframe.board.monitor.command_set import CommandContext, CommandTable
from stillframe.board.monitor.server import QmpServer
from stillframe.errors import MachineError
from stillframe.qmp.errors import QmpError


class Inner(msgspec.Struct):
    state: bool
    kind: Literal["one", "two"] = "one"


class Echo(msgspec.Struct, rename="kebab"):
    """Arguments of every kind."""

    file_name: str
    count: int = 0
    small: Annotated[int, msgspec.Meta(extra={"bits": 8})] = 0
    large: Uint64 = 0
    ratio: float | None = None
    inner: list[Inner] = []
    format: Literal["png", "ppm"] = "ppm"


class Gate:
    """A command that waits until the test lets it go."""

    def __init__(self) -> None:
        self.entered = threading.Event()
        self.leave = threading.Event()

    def wait(self, _context: CommandContext, _arguments: object) -> None:
        self.entered.set()
        assert self.leave.wait(60)


class Served:
    """``server`` listens at ``address``."""

    def __init__(self, address: str) -> None:
        self.gate = Gate()
        self.table = CommandTable(threading.RLock())
        self.table.add("echo", lambda _context, given: msgspec.to_builtins(given), arguments=Echo)
        self.table.add("count", lambda context, _given: self.ran.append(context))
        self.table.add("large", self._large)
        self.table.add("gate", self.gate.wait, locked=False)
        self.table.add("locked-gate", self.gate.wait)
        self.table.add("unlocked", lambda _context, _given: None, locked=False)
        self.table.add("fails", self._fail)
        self.table.add("refuses", self._refuse)
        self.table.add("crashes", lambda _context, _given: [][0])
        self.table.add("unwritable", lambda _context, _given: {"a": {1, 2}.__iter__()})
        self.table.add("take", self._take)
        self.ran: list[CommandContext] = []
        self.taken: list[int] = []
        self.server = QmpServer(self.table, version=(1, 2, 3), package="test")
        self.address = address
        self.server.listen(address)

    def _large(self, context: CommandContext, _given: object) -> str:
        self.ran.append(context)
        return "x" * (1 << 16)

    def _take(self, context: CommandContext, _given: object) -> None:
        self.taken.append(context.take_fd())

    def _fail(self, _context: CommandContext, _given: object) -> None:
        raise QmpError("no such thing", "DeviceNotFound")

    def _refuse(self, _context: CommandContext, _given: object) -> None:
        raise MachineError("it is broken", why="it fell down")


@pytest.fixture
def served(tmp_path: Path) -> Iterator[Served]:
    """A server that listens on a unix socket."""
    one = Served(str(tmp_path / "qmp"))
    yield one
    one.gate.leave.set()
    one.server.close()
