"""QEMUs as the tools of the field start them: the lines in ``tests/data/command_lines``.

A file has comments (``#``), commands that prepare it (``#!``), and the line itself in a shell's
words. ``{dir}`` is a directory of its own, in which it is started; ``{port}`` a free port;
``{listen:NAME}`` the number of an inherited descriptor that listens on a socket of that name, as
libvirt does it; ``{open:NAME}`` one that has a file open; ``{listening:NAME}`` the path of a
socket on which somebody listens.
"""

from __future__ import annotations

import contextlib
import os
import re
import shlex
import signal
import socket
import subprocess
import time
from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path

from guests.qemu import qemu_binary
from stillframe.machine.qemu.command_line import parse_command_line
from stillframe.qmp.client import QmpClient
from tests.support.listening import wait_listening

LINES = Path(__file__).parents[1] / "data" / "command_lines"
_START_S = 60.0


def names() -> list[str]:
    """The tools whose lines there are."""
    return sorted(path.stem for path in LINES.glob("*.txt"))


class ToolVm:
    """A QEMU that was started as a tool starts it. ``monitor``: its QMP socket, or None."""

    def __init__(self, name: str, directory: Path, stack: ExitStack) -> None:
        self.directory = directory
        self._stack = stack
        self._fds: list[int] = []
        text = (LINES / f"{name}.txt").read_text()
        for line in text.splitlines():
            if line.startswith("#!"):
                subprocess.run(self._fill(line[2:]), shell=True, check=True, cwd=directory)
        body = "\n".join(line for line in text.splitlines() if not line.startswith("#"))
        self.words = [self._fill(word) for word in shlex.split(body)]
        if "-no-hpet" in self.words and not _knows("-no-hpet"):
            self.words.remove("-no-hpet")  # gone in QEMU 9
        self.pid = self._start()
        self.monitor = self._monitor()
        if "-S" in self.words and self.monitor:
            with QmpClient.connect(self.monitor) as qmp:
                qmp.execute("cont")

    def _fill(self, text: str) -> str:
        text = text.replace("{dir}", str(self.directory)).replace("{port}", str(_free_port()))
        return re.sub(r"\{(listen|open|listening):([\w.-]+)\}", self._descriptor, text)

    def _descriptor(self, match: re.Match[str]) -> str:
        path = self.directory / match[2]
        if match[1] == "open":
            fd = os.open(path, os.O_WRONLY | os.O_APPEND)
            self._stack.callback(os.close, fd)
        else:
            server = self._stack.enter_context(socket.socket(socket.AF_UNIX))
            server.bind(str(path))
            server.listen(1)
            if match[1] == "listening":
                return str(path)
            fd = server.fileno()
        self._fds.append(fd)
        return str(fd)

    def _start(self) -> int:
        daemon = "-daemonize" in self.words
        log = self._stack.enter_context((self.directory / "qemu.out").open("wb"))
        process = subprocess.Popen(
            [qemu_binary(), *self.words[1:]],
            cwd=self.directory,
            pass_fds=self._fds,
            stdin=subprocess.DEVNULL,
            stdout=log,
            stderr=log,
        )
        if not daemon:
            self._stack.callback(process.wait)
            self._stack.callback(process.kill)
            deadline = time.monotonic() + _START_S
            # A newer QEMU's wrapper is a shell first; and execve(2) is no instant.
            place = Path(f"/proc/{process.pid}")
            while (
                "qemu-system" not in os.readlink(place / "exe")
                or not (place / "cmdline").read_bytes()
            ):
                if time.monotonic() > deadline:
                    raise RuntimeError((self.directory / "qemu.out").read_text())
                time.sleep(0.01)
            return process.pid
        if process.wait(_START_S):
            raise RuntimeError((self.directory / "qemu.out").read_text())
        pid = int((self.directory / "pid").read_text())
        self._stack.callback(_kill, pid)
        return pid

    def _monitor(self) -> str | None:
        for fd_or_path in parse_command_line(self.words).monitors:
            path = fd_or_path.path or (str(self.directory / "monitor.sock"))
            monitor = self.directory / path
            try:
                wait_listening(monitor, _START_S, Path(f"/proc/{self.pid}/fd").exists)
            except RuntimeError as error:
                raise RuntimeError((self.directory / "qemu.out").read_text()) from error
            return str(monitor)
        return None


@contextlib.contextmanager
def tool_vm(name: str, directory: Path) -> Iterator[ToolVm]:
    """Start one; it is killed afterwards."""
    with ExitStack() as stack:
        yield ToolVm(name, directory, stack)


def _kill(pid: int) -> None:
    with contextlib.suppress(ProcessLookupError):
        os.kill(pid, signal.SIGKILL)


def _knows(option: str) -> bool:
    help_ = subprocess.run([qemu_binary(), "-help"], capture_output=True, text=True, check=True)
    return re.search(rf"^{option}\b", help_.stdout, re.MULTILINE) is not None


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port: int = probe.getsockname()[1]
        return port
