"""Boards as users run them: processes ``stillframe board run``."""

from __future__ import annotations

import json
import os
import select
import shutil
import signal
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path

from tests.support.ledger_host import Console

START_S = 60.0
PROGRAM = (sys.executable, "-m", "stillframe")
AUDIT = "AUDIT"


class BoardProcess:
    """One board, in a process of its own; ended with the context.

    Args:
        words: of ``stillframe board run``; monitor and serial line are added.
        program: what runs stillframe, such as another user's.
    """

    def __init__(
        self,
        *words: object,
        program: Sequence[str] = PROGRAM,
        environment: Mapping[str, str] | None = None,
        directory: Path | None = None,
        name: str | None = None,
    ) -> None:
        self._temporary = directory is None
        self.directory = directory or Path(tempfile.mkdtemp(prefix="board-"))
        self.name = name or f"board-{os.getpid()}-{self.directory.name[-4:]}"
        self.qmp = self.directory / f"{self.name}.qmp"
        self.serial = self.directory / f"{self.name}.serial"
        command = [*program, "board", "run", *map(str, words), "--name", self.name]
        command += ["--qmp", str(self.qmp), "--serial", f"unix:{self.serial}"]
        self.process = subprocess.Popen(
            command,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.PIPE,
            env=None if environment is None else dict(environment),
            cwd="/" if environment is not None else None,
        )
        self._console: Console | None = None
        try:
            self._wait_until_it_runs()
        except BaseException:
            self.close()
            raise

    def _wait_until_it_runs(self) -> None:
        # It says where its monitor is once that listens.
        assert self.process.stderr is not None
        line = self.process.stderr.readline().decode()
        assert "QMP at" in line, line + self.process.stderr.read().decode()

    @property
    def pid(self) -> int:
        return self.process.pid

    @property
    def console(self) -> Console:
        """The serial line; the guest may have said something before."""
        if self._console is None:
            self._console = Console(self.serial)
        return self._console

    def audit(self) -> str:
        """The ledger's, or life's, own audit."""
        self.console.send("a")
        return self.console.wait(AUDIT)

    def transfers(self) -> int:
        """Of the ledger, as its next tick tells."""
        return transfers(self.console.wait("tick"))

    def close(self) -> None:
        if self._console is not None:
            self._console.close()
        self.process.kill()
        self.process.communicate()
        if self._temporary:
            shutil.rmtree(self.directory, ignore_errors=True)

    def __enter__(self) -> BoardProcess:
        return self

    def __exit__(self, *_error: object) -> None:
        self.close()


def transfers(line: str) -> int:
    """The number in ``transfers=N``."""
    return int(line.partition("transfers=")[2].split()[0])


def ledger(*words: object, options: str = "rate=20 tick_ms=100", **more: object) -> BoardProcess:
    """A board whose ledger is at work."""
    board = BoardProcess("ledger", "--append", options, "--paused", *words, **more)  # type: ignore[arg-type]
    try:
        console = board.console  # before it says anything
        resume(board.qmp)
        console.wait("ledger ready")
    except BaseException:
        board.close()
        raise
    return board


def resume(qmp: Path) -> None:
    """Send ``cont``."""
    from stillframe.qmp.client import QmpClient

    with QmpClient.connect(str(qmp)) as client:
        client.execute("cont")


@contextmanager
def restored(shown: str | bytes) -> Iterator[Console]:
    """The serial line of the board that ``stillframe restore --json`` told of; ended at the end."""
    told = json.loads(shown)
    argv = told["argv"]
    serial = argv[argv.index("--serial") + 1]
    console = Console(Path(serial.removeprefix("unix:")))
    try:
        yield console
    finally:
        console.close()
        end(told["pid"])
        shutil.rmtree(told["directory"], ignore_errors=True)
        if told["disk_directory"]:
            shutil.rmtree(told["disk_directory"], ignore_errors=True)


def end(pid: int) -> None:
    """Kill a process that a test has started, and wait until it is gone."""
    pidfd = os.pidfd_open(pid)
    try:
        signal.pidfd_send_signal(pidfd, signal.SIGKILL)
        assert select.select([pidfd], [], [], START_S)[0]
    finally:
        os.close(pidfd)


__all__ = ["BoardProcess", "Console", "end", "ledger", "restored", "resume"]
