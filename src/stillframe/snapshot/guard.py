"""Starts and steers the guard process; see ``guard_process``."""

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
    """Sees to it that a stopped guest goes on if we die."""

    @property
    def alive(self) -> bool:
        """Whether it still can."""

    def arm(self) -> None:
        """Before the VM is stopped."""

    def disarm(self) -> None:
        """The VM goes on again."""

    def leave(
        self, commands: Sequence[Command], agent: str | None, folds: Sequence[FoldWill] = ()
    ) -> None:
        """A last will: what to run on the monitor, in order, the guest agent to thaw by, and
        overlays to fold back, if we die, also when the VM is not stopped; replaces an earlier one.
        """

    def close(self) -> None:
        """End it; never raises."""


class NoGuard:
    """For a machine of this very process, which dies with us."""

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
    """A guard that shares a machine's monitor connection (``Machine.monitor_fd``).

    Raises:
        HostError: it could not be started; the guest was not touched.
    """
    return NoGuard() if monitor_fd is None else Guard(monitor_fd)


class Guard:
    """A guard process that shares our monitor connection.

    Args:
        script: what it runs, with ``monitor_fd``, a control channel and ``words``.
        shared_fds: what else it shares.

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
                # A session of its own: a Ctrl-C in the terminal is for us, not for it.
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
        ready = select.poll()  # takes descriptors of any number
        ready.register(ours, select.POLLIN)
        if not ready.poll(_READY_S * 1e3) or ours.recv(1) != b"R":
            self.close()
            raise HostError("the guard process does not answer", guest_state="running")

    @property
    def pid(self) -> int:
        return self._process.pid

    @property
    def alive(self) -> bool:
        """Whether nobody has killed it."""
        return self._process.poll() is None

    def arm(self) -> None:
        """Before the VM is stopped: from now on our death lets it go on.

        Raises:
            HostError: the guard is gone; the VM must not be stopped.
        """
        self._armed = True
        self._send(b"A")

    def disarm(self) -> None:
        """The VM goes on again."""
        # A guard that died meanwhile has nothing to guard any more.
        with contextlib.suppress(HostError):
            self._send(b"D")
        self._armed = False

    def leave(
        self, commands: Sequence[Command], agent: str | None, folds: Sequence[FoldWill] = ()
    ) -> None:
        """Take down what to do if we die: give block jobs up, thaw a guest.

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
        """End the guard. If it is still armed, it lets the VM go on first, and stays until QEMU has
        answered it, longer than we if need be; so it does where an agent is still to thaw."""
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
