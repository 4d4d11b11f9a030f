"""Directories that belong to a living process, and end with it.

A lock in each is held as long as its owner lives; what is left of one that was killed is swept away
by whoever makes the next one. A lock, since the number of a process may be another's by then.
"""

from __future__ import annotations

import contextlib
import fcntl
import os
import shutil
import stat
from pathlib import Path

from stillframe.errors import HostError
from stillframe.restore.places import make_directory

_LOCK = "owner.lock"


def make_owned(directory: Path) -> int:
    """Make it, private, and its parents as needed.

    Returns:
        The descriptor that holds the lock. Who has it or inherits it owns the directory.

    Raises:
        HostError: not possible.
    """
    # It gets its name locked, so that nobody takes it for what somebody left.
    nameless = directory.with_name(f".{directory.name}.new")
    make_directory(nameless)
    lock_fd = -1
    try:
        flags = os.O_RDWR | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC
        lock_fd = os.open(nameless / _LOCK, flags, 0o600)
        fcntl.flock(lock_fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
        nameless.rename(directory)
    except OSError as error:
        if lock_fd >= 0:
            os.close(lock_fd)
        remove(nameless)
        raise HostError(f"cannot make the directory {directory}", why=error.strerror) from error
    return lock_fd


def sweep(root: Path, prefix: str = "") -> None:
    """Remove the directories in ``root`` that are ours and whose owners died. Never raises.

    Args:
        prefix: of their names, where others' are there, too.
    """
    with contextlib.suppress(OSError):
        for directory in root.iterdir():
            if directory.name.startswith(prefix) and not directory.name.startswith("."):
                _sweep_one(directory)


def _sweep_one(directory: Path) -> None:
    with contextlib.suppress(OSError):
        status = directory.lstat()
        if not stat.S_ISDIR(status.st_mode) or status.st_uid != os.geteuid():
            return
        lock_fd = os.open(directory / _LOCK, os.O_RDWR | os.O_NOFOLLOW | os.O_CLOEXEC)
        try:
            fcntl.flock(lock_fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
            remove(directory)
        finally:
            os.close(lock_fd)


def remove(directory: Path) -> None:
    """With all that is in it; the lock last, so that what is left of an attempt is swept, too.
    Never raises."""
    with contextlib.suppress(OSError):
        for entry in directory.iterdir():
            if entry.name == _LOCK:
                continue
            if entry.is_dir() and not entry.is_symlink():
                shutil.rmtree(entry, ignore_errors=True)
            else:
                entry.unlink(missing_ok=True)
        (directory / _LOCK).unlink(missing_ok=True)
        directory.rmdir()
