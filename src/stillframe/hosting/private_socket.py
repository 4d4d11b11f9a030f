"""A place of its own for a board's monitor, where nobody named one."""

from __future__ import annotations

import contextlib
import fcntl
import os
import re
import secrets
from collections.abc import Iterator
from pathlib import Path

from stillframe.errors import HostError
from stillframe.restore.places import make_directory, runtime_root

_SOCKET, _LOCK = "qmp.sock", "board.lock"


class PrivateSocket:
    """A directory of mode 0700 for a socket, among those of restored VMs.

    A lock in it is held while its board's process lives; what is left of a process that was killed
    is swept away when the next one is made.

    Raises:
        HostError: it cannot be made.
    """

    def __init__(self, name: str) -> None:
        entry = f"{re.sub(r'[^A-Za-z0-9_]', '', name)[:16] or 'board'}-{secrets.token_hex(3)}"
        root = runtime_root()
        self._directory = root / entry
        self.path = str(self._directory / _SOCKET)
        self._lock_fd = -1
        try:
            # Of two that start at once, neither may take the other's for what somebody left.
            root.mkdir(mode=0o700, parents=True, exist_ok=True)
            with _locked(root):
                _sweep(root)
                make_directory(self._directory)
                flags = os.O_RDWR | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC
                self._lock_fd = os.open(self._directory / _LOCK, flags, 0o600)
                fcntl.flock(self._lock_fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            self.close()
            raise HostError(
                f"cannot make the directory {self._directory}", why=error.strerror
            ) from error

    def close(self) -> None:
        """Remove it; never raises."""
        _remove(self._directory)
        if self._lock_fd >= 0:
            os.close(self._lock_fd)
            self._lock_fd = -1


@contextlib.contextmanager
def _locked(directory: Path) -> Iterator[None]:
    descriptor = os.open(directory, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX)
        yield
    finally:
        os.close(descriptor)


def _sweep(root: Path) -> None:
    """Remove the directories whose locks nobody holds; those of restored VMs have none."""
    for directory in root.iterdir():
        with contextlib.suppress(OSError):
            lock_fd = os.open(directory / _LOCK, os.O_RDWR | os.O_NOFOLLOW | os.O_CLOEXEC)
            try:
                fcntl.flock(lock_fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
                _remove(directory)
            finally:
                os.close(lock_fd)


def _remove(directory: Path) -> None:
    with contextlib.suppress(OSError):
        for name in (_SOCKET, _LOCK):
            (directory / name).unlink(missing_ok=True)
        directory.rmdir()
