"""A board of the demo: a process ``stillframe board run``, its serial line and its monitor."""

from __future__ import annotations

import contextlib
import ctypes
import os
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Mapping
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from stillframe.errors import MachineError, NotFoundError, StillframeError

if TYPE_CHECKING:
    from stillframe.api import ProcessMachine

_START_S = 20.0
_ANSWER_S = 20.0
_END_S = 5.0
_PR_SET_PDEATHSIG = 1


class DemoBoard:
    """One board in a process of its own, which ends with this one. Use it as a context manager.

    Args:
        directory: for its sockets and log, named after ``name``.
        words: options of ``stillframe board run``, besides name, serial line and monitor.
    """

    def __init__(self, directory: Path, name: str, *words: str) -> None:
        """Start the board and connect; its guest waits for ``cont``, or for the incoming stream.

        Raises:
            MachineError: it did not start, with its own message.
            StillframeError: see ``api.connect``.
        """
        self.name = name
        self._log = directory / f"{name}.log"
        self._qmp_path = directory / f"{name}.qmp"
        serial = directory / f"{name}.serial"
        self.command = ("board", "run", *words, "--name", name)
        self._console: Console | None = None
        self._machine: ProcessMachine | None = None
        with self._log.open("wb") as log:
            sockets = ("--serial", f"unix:{serial}", "--qmp", str(self._qmp_path))
            self._process = subprocess.Popen(
                [sys.executable, "-P", "-m", "stillframe", *self.command, *sockets, "--paused"],
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
                preexec_fn=partial(_end_with_parent, os.getpid()),
            )
        try:
            self._machine = self._connect()
            self._console = Console(serial)
        except BaseException:
            self.close()
            raise

    def _connect(self) -> ProcessMachine:
        from stillframe import api

        deadline_s = time.monotonic() + _START_S
        while True:
            if self._process.poll() is not None:
                raise self._failure("did not start")
            try:
                return api.connect(str(self._qmp_path))
            except (NotFoundError, MachineError):  # not there yet, or not listening yet
                if time.monotonic() > deadline_s:
                    raise
            time.sleep(0.01)

    def _failure(self, what: str) -> StillframeError:
        words = self._log.read_text(errors="replace").strip().splitlines()
        return MachineError(f"board {self.name} {what}", why=words[-1] if words else None)

    @property
    def pid(self) -> int:
        return self._process.pid

    @property
    def console(self) -> Console:
        if self._console is None:
            raise self._failure("has no serial line")
        return self._console

    def qmp(self, command: str, **arguments: object) -> Any:
        """Send a command to the board's monitor; return the reply.

        Raises:
            MachineError: the monitor refused, or is gone.
        """
        if self._machine is None:
            raise self._failure("has no monitor")
        return self._machine.qmp.execute(command, arguments or None)

    def snapshot(self, file: Path) -> Mapping[str, Any]:
        """Have the board take a background snapshot of itself; return the last ``query-migrate``.

        Raises:
            MachineError: it failed, with the board's own message.
        """
        wanted = {"capability": "background-snapshot", "state": True}
        self.qmp("migrate-set-capabilities", capabilities=[wanted])
        self.qmp("migrate", uri=f"file:{file}")
        return self._migrated()

    def wait_loaded(self) -> None:
        """Wait until the incoming stream is loaded.

        Raises:
            MachineError: it failed, with the board's own message.
        """
        self._migrated()

    def _migrated(self) -> Mapping[str, Any]:
        deadline_s = time.monotonic() + _ANSWER_S
        while time.monotonic() < deadline_s:
            if self._process.poll() is not None:
                raise self._failure("ended")
            info: Mapping[str, Any] = self.qmp("query-migrate")
            if info.get("status") == "completed":
                return info
            if info.get("status") in ("failed", "cancelled"):
                raise MachineError(
                    f"the migration of board {self.name} failed", why=info.get("error-desc")
                )
            time.sleep(0.01)
        raise MachineError(f"the migration of board {self.name} does not end")

    def close(self) -> None:
        """End the board; never raises."""
        if self._machine is not None:
            with contextlib.suppress(StillframeError):
                self.qmp("quit")
            self._machine.close()
        else:
            self._process.kill()
        try:
            self._process.wait(_END_S)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()
        if self._console is not None:
            self._console.close()

    def __enter__(self) -> DemoBoard:
        return self

    def __exit__(self, *_error: object) -> None:
        self.close()


class Console:
    """A guest's serial line: its lines and their arrival times."""

    def __init__(self, path: Path) -> None:
        """Connect.

        Raises:
            MachineError: the connection fails.
        """
        self._socket = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        try:
            self._socket.connect(str(path))
        except OSError as error:
            self._socket.close()
            raise MachineError(f"no serial line at {path}", why=error.strerror) from error
        self._lines: list[tuple[float, str]] = []
        self._more = threading.Condition()
        self._thread = threading.Thread(target=self._read, name="demo console", daemon=True)
        self._thread.start()

    def _read(self) -> None:
        with contextlib.suppress(OSError), self._socket.makefile("rb") as received:
            for line in received:
                now_s = time.monotonic()
                with self._more:
                    self._lines.append((now_s, line.decode(errors="replace").strip()))
                    self._more.notify_all()

    def lines(self, start: str = "") -> list[tuple[float, str]]:
        """Return all lines so far that begin with ``start``, with arrival times (monotonic, s)."""
        with self._more:
            return [(at, line) for at, line in self._lines if line.startswith(start)]

    def wait(self, *starts: str, after: int = 0, timeout_s: float = _ANSWER_S) -> str:
        """Wait for the first line that begins with one of ``starts``, and return it.

        Args:
            after: how many lines to skip; ``count`` tells how many there are.

        Raises:
            MachineError: none came in time.
        """
        deadline_s = time.monotonic() + timeout_s
        with self._more:
            while True:
                for _, line in self._lines[after:]:
                    if line.startswith(starts):
                        return line
                left_s = deadline_s - time.monotonic()
                if left_s <= 0:
                    raise MachineError(f"the guest does not say {' or '.join(starts)}")
                self._more.wait(left_s)

    @property
    def count(self) -> int:
        with self._more:
            return len(self._lines)

    def ask(self, line: str, *starts: str) -> str:
        """Send a line, and return the answer that begins with one of ``starts``.

        Raises:
            MachineError: none came in time, or the serial line is gone.
        """
        before = self.count
        try:
            self._socket.sendall(f"{line}\n".encode())
        except OSError as error:
            raise MachineError("the guest's serial line is gone", why=error.strerror) from error
        return self.wait(*starts, after=before)

    def close(self) -> None:
        """Hang up; never raises."""
        with contextlib.suppress(OSError):  # the guest may have hung up
            self._socket.shutdown(socket.SHUT_RDWR)
        self._thread.join()
        self._socket.close()


def _end_with_parent(parent_pid: int) -> None:
    """In the new process: be killed when the demo dies (prctl(2)), even if it has died by now."""
    ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
    if os.getppid() != parent_pid:
        os.kill(os.getpid(), signal.SIGKILL)


def number(line: str, name: str) -> int:
    """Return the number in ``name=NUMBER`` of a guest's line.

    Raises:
        MachineError: there is none.
    """
    for word in line.split():
        key, equals, value = word.partition("=")
        if key == name and equals and value.isdigit():
            return int(value)
    raise MachineError(f"the guest says {line!r}, without {name}")
