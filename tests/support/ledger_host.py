"""Boards with the ledger in them, and what a test asks of them."""

from __future__ import annotations

import os
import socket
import subprocess
import sys
from contextlib import ExitStack
from pathlib import Path
from typing import Any

from stillframe.board.guests import guest_path
from stillframe.board.hardware.config import BoardConfig
from stillframe.board.memory.own_protection import Preference
from stillframe.board.migration.engine import Migration
from stillframe.board.migration.host import BoardHost, start_host
from tests.support.listening import wait_listening
from tests.support.waiting import wait_until

TIMEOUT_S = 60.0
REPOSITORY = Path(__file__).parents[2]


class Console:
    """A guest's serial line, by its lines."""

    def __init__(self, path: Path) -> None:
        self._socket = socket.socket(socket.AF_UNIX)
        self._socket.settimeout(TIMEOUT_S)
        wait_listening(path)  # its path is there before it listens
        self._socket.connect(str(path))
        self._rest = b""

    def send(self, line: str) -> None:
        self._socket.sendall(line.encode() + b"\n")

    def wait_ready(self) -> None:
        """Until the ledger is at work; what it said before we connected is lost."""
        self.wait("ledger ready", "tick")

    def wait(self, *starts: str) -> str:
        """The next line that starts so; those before it are forgotten.

        Raises:
            TimeoutError: nothing came for long. EOFError: the board is gone.
        """
        while True:
            while b"\n" not in self._rest:
                data = self._socket.recv(65536)
                if not data:
                    raise EOFError(self._rest)
                self._rest += data
            line, _, self._rest = self._rest.partition(b"\n")
            text = line.decode(errors="replace").strip()
            if text.startswith(starts):
                return text

    def close(self) -> None:
        self._socket.close()


class LedgerHost:
    """One board of this process with the ledger."""

    def __init__(self, host: BoardHost, serial: Path) -> None:
        self.host = host
        self.board = host.board
        self.migration: Migration = host.migration
        self._serial = serial
        self._console: Console | None = None

    @property
    def console(self) -> Console:
        if self._console is None:
            self._console = Console(self._serial)
        return self._console

    def audit(self) -> str:
        """What the guest's own audit says; ``AUDIT ok ...`` if all of RAM is of one instant."""
        self.console.send("a")
        return self.console.wait("AUDIT")

    def transfers(self) -> int:
        """How far the guest is."""
        words = dict(word.split("=") for word in self.audit().split() if "=" in word)
        return int(words["transfers"])

    def ram(self, idstr: str = "board.ram") -> bytes:
        """Content of a RAM block now."""
        for ram in self.board.rams:
            if ram.idstr == idstr:
                return ram.read(0, ram.length_bytes)
        raise AssertionError(f"no RAM block {idstr}")

    def query(self) -> dict[str, Any]:
        return self.migration.query()

    def wait_status(self, *states: str) -> str:
        wait_until(lambda: self.query().get("status") in states, f"status never was {states}")
        return str(self.query()["status"])

    def close(self) -> None:
        if self._console is not None:
            self._console.close()
        self.host.close()


class LedgerHosts:
    """Makes boards of one kind in this process; all are closed by ``stack``."""

    def __init__(
        self,
        stack: ExitStack,
        directory: Path,
        *,
        protection: Preference = "auto",
        ram_mib: int = 48,
        vcpus: int = 2,
        options: str = "rate=20",
        disk: Path | None = None,
    ) -> None:
        self._stack = stack
        self.directory = directory
        self._protection: Preference = protection
        self._ram_bytes = ram_mib << 20
        self._vcpus = vcpus
        self._options = options
        self._disk = disk
        self._count = 0

    def _start(self, **options: Any) -> LedgerHost:
        self._count += 1
        serial = self.directory / f"serial{self._count}"
        config = BoardConfig(
            name=f"ledger{self._count}",
            guest_path=str(guest_path("ledger")),
            command_line=self._options,
            ram_bytes=self._ram_bytes,
            vcpus=self._vcpus,
            disk_path=str(self._disk) if self._disk else None,
            display_width=64,
            display_height=64,
            serial=f"unix:{serial}",
        )
        host = start_host(config, protection_prefer=self._protection, **options)
        ledger = LedgerHost(host, serial)
        self._stack.callback(ledger.close)
        return ledger

    def source(self, **options: Any) -> LedgerHost:
        """One whose guest is at work."""
        ledger = self._start(**options)
        ledger.console.wait_ready()
        return ledger

    def destination(self, uri: str = "defer", **options: Any) -> LedgerHost:
        """One that waits for a migration."""
        return self._start(incoming=uri, **options)

    def destination_process(self, uri: str) -> subprocess.Popen[str]:
        """As ``destination``, in a process of its own; it listens already."""
        process = self._process("destination", uri, {})
        assert process.stdout is not None
        assert process.stdout.readline() == "listening\n"
        return process

    def source_process(self, uri: str, environment: dict[str, str]) -> subprocess.Popen[str]:
        """As ``source``, in a process of its own, and migrating to ``uri``."""
        process = self._process("source", uri, environment)
        assert process.stdin is not None
        assert process.stdout is not None
        assert process.stdout.readline() == "ready\n"
        console = Console(self.directory / f"serial{self._count}")
        console.wait_ready()
        console.close()
        process.stdin.write("go\n")
        process.stdin.flush()
        return process

    def _process(self, role: str, uri: str, environment: dict[str, str]) -> subprocess.Popen[str]:
        self._count += 1
        process = subprocess.Popen(
            [
                sys.executable,
                "-m",
                "tests.support.ledger_process",
                role,
                uri,
                str(self.directory / f"serial{self._count}"),
                str(self._ram_bytes),
                str(self._vcpus),
                self._options,
            ],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            cwd=REPOSITORY,
            env={**os.environ, **environment},
        )
        self._stack.callback(process.wait)
        self._stack.callback(process.kill)
        return process
