"""The snapshotter's side of the guard process: starts and controls it; see ``guard_process``."""

from __future__ import annotations

import contextlib
import json
import select
import socket
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Protocol

from stillframe.disks.agent_channel import is_thaw
from stillframe.disks.overlays import FoldWill
from stillframe.errors import HostError
from stillframe.qmp.command import Command

_READY_S = 10.0
_END_S = 5.0
_SCRIPT = str(Path(__file__).with_name("guard_process.py"))


class Guarding(Protocol):
    """A guard: resumes a stopped guest if this process dies."""

    @property
    def alive(self) -> bool:
        """Whether the guard can still do that."""

    def arm(self) -> None:
        """Call before the VM is stopped."""

    def disarm(self) -> None:
        """Call when the VM runs again."""

    def leave(
        self, commands: Sequence[Command], agent: str | None, folds: Sequence[FoldWill] = ()
    ) -> None:
        """Leave a last will for the case that this process dies, even with the VM not stopped:
        monitor commands in order, the guest agent to thaw through, and overlays to fold back. It
        replaces an earlier will."""

    def close(self) -> None:
        """End the guard; never raises."""


class NoGuard:
    """The null guard, for a machine inside this process, which dies with it."""

    alive = True

    def arm(self) -> None:
        """Nothing to do."""

    def disarm(self) -> None:
        """Nothing to do."""

    def leave(
        self, commands: Sequence[Command], agent: str | None, folds: Sequence[FoldWill] = ()
    ) -> None:
        """Nothing to do."""

    def close(self) -> None:
        """Nothing to do."""


def guard_of(monitor_fd: int | None) -> Guarding:
    """Start a guard that shares a machine's monitor connection (``Machine.monitor_fd``).

    Raises:
        HostError: it could not be started; the guest was not touched.
    """
    return NoGuard() if monitor_fd is None else Guard(monitor_fd)


class Guard:
    """A guard process that shares our monitor connection.

    Args:
        script: the program to run, with ``monitor_fd``, a control channel and ``words`` as its
            arguments.
        shared_fds: further descriptors that it inherits.

    Raises:
        HostError: it could not be started; the guest was not touched.
    """

    def __init__(
        self,
        monitor_fd: int,
        script: str = _SCRIPT,
        words: Sequence[str] = (),
        shared_fds: Sequence[int] = (),
    ) -> None:
        self._armed = False
        self._thaws = False
        ours, theirs = socket.socketpair()
        self._control = ours
        try:
            with theirs:
                # A session of its own, so that Ctrl-C in the terminal does not reach it.
                self._process = subprocess.Popen(
                    [
                        sys.executable,
                        "-I",
                        "-S",
                        script,
                        str(monitor_fd),
                        str(theirs.fileno()),
                        *words,
                    ],
                    pass_fds=(monitor_fd, theirs.fileno(), *shared_fds),
                    stdin=subprocess.DEVNULL,
                    stdout=subprocess.DEVNULL,
                    stderr=subprocess.DEVNULL,
                    start_new_session=True,
                    cwd="/",
                )
        except OSError as error:
            ours.close()
            raise HostError(
                "the guard process cannot be started", why=str(error), guest_state="running"
            ) from error
        ready = select.poll()  # unlike select(2), takes descriptors above 1023
        ready.register(ours, select.POLLIN)
        if not ready.poll(_READY_S * 1e3) or ours.recv(1) != b"R":
            self.close()
            raise HostError("the guard process does not answer", guest_state="running")

    @property
    def pid(self) -> int:
        return self._process.pid

    @property
    def alive(self) -> bool:
        """Whether the guard process is still there."""
        return self._process.poll() is None

    def arm(self) -> None:
        """Call before the VM is stopped: from now on, if this process dies, the VM is resumed.

        Raises:
            HostError: the guard is gone; the VM must not be stopped.
        """
        self._armed = True
        self._send(b"A")

    def disarm(self) -> None:
        """Call when the VM runs again."""
        # A guard that died meanwhile is no longer needed.
        with contextlib.suppress(HostError):
            self._send(b"D")
        self._armed = False

    def leave(
        self, commands: Sequence[Command], agent: str | None, folds: Sequence[FoldWill] = ()
    ) -> None:
        """Send the last will: block jobs to cancel, an agent to thaw through, overlays to fold.

        Raises:
            HostError: the guard is gone.
        """
        self._thaws = agent is not None or any(map(is_thaw, commands))
        said = {
            "lines": _lines(commands),
            "agent": agent,
            "folds": [
                {
                    "path": fold.path,
                    "finish": _lines(fold.finish),
                    "begin": _lines([fold.begin]),
                    "remove": _lines([fold.remove]),
                }
                for fold in folds
            ],
        }
        will = json.dumps(said).encode()
        self._send(b"W" + len(will).to_bytes(4, "big") + will)

    def _send(self, command: bytes) -> None:
        try:
            self._control.sendall(command)
        except OSError as error:
            raise HostError(
                "the guard process is gone",
                why="somebody killed it",
                remedy="take the snapshot again",
                guest_state="running",
            ) from error

    def close(self) -> None:
        """End the guard. If it is armed, it resumes the VM first; with a thaw in its will, it thaws
        first. In both cases it may outlive this process until QEMU or the agent answers."""
        self._control.close()
        try:
            self._process.wait(_END_S)
        except subprocess.TimeoutExpired:
            if not self._armed and not self._thaws:
                self._process.kill()
                self._process.wait()


def _lines(commands: Sequence[Command]) -> list[str]:
    return [
        json.dumps({"execute": name, "arguments": arguments, "id": f"stillframe-will-{number}"})
        for number, (name, arguments) in enumerate(commands)
    ]
