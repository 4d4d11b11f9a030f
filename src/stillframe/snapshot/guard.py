"""Starts and steers the guard process; see ``guard_process``."""

from __future__ import annotations

import contextlib
import select
import socket
import subprocess
import sys
from pathlib import Path
from typing import Protocol

from stillframe.errors import HostError

_READY_S = 10.0
_END_S = 5.0


class Guarding(Protocol):
    """Sees to it that a stopped guest goes on if we die."""

    def arm(self) -> None:
        """Before the VM is stopped."""

    def disarm(self) -> None:
        """The VM goes on again."""

    def close(self) -> None:
        """End it; never raises."""


class NoGuard:
    """For a machine of this very process, which dies with us."""

    def arm(self) -> None:
        """Nothing to do."""

    def disarm(self) -> None:
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

    Raises:
        HostError: it could not be started; the guest was not touched.
    """

    def __init__(self, monitor_fd: int) -> None:
        self._armed = False
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
                        str(Path(__file__).with_name("guard_process.py")),
                        str(monitor_fd),
                        str(theirs.fileno()),
                    ],
                    pass_fds=(monitor_fd, theirs.fileno()),
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
        if not select.select([ours], [], [], _READY_S)[0] or ours.recv(1) != b"R":
            self.close()
            raise HostError("the guard process does not answer", guest_state="running")

    @property
    def pid(self) -> int:
        return self._process.pid

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
        answered it, longer than we if need be."""
        self._control.close()
        try:
            self._process.wait(_END_S)
        except subprocess.TimeoutExpired:
            if not self._armed:
                self._process.kill()
                self._process.wait()
