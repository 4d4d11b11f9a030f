"""Private directories: for the sockets and logs of VMs that Stillframe starts, and for work files.

Each belongs to a living process and ends with it: the owner holds a lock in it, and the next to
make a directory sweeps away what killed owners left. It is a lock, since a pid may be another
process's by then.
"""

from __future__ import annotations

import contextlib
import fcntl
import os
import re
import secrets
import shutil
import stat
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from stillframe.errors import HostError
from stillframe.restore.records import RunAs

_LOCK = "owner.lock"
PASSABLE = 0o711
"""The mode of a directory that another user, as whom QEMU runs, may pass through."""
ROOTS_RUN = Path("/run/stillframe")
"""Root's own; a VM that root restores for another user has a directory there, of that user."""
ROOTS_STATE = Path("/var/lib/stillframe")


@contextmanager
def socket_directory(name: str) -> Iterator[Path]:
    """Make a directory for a VM's sockets that exists as long as the context.

    Args:
        name: of the VM, as a hint for people.

    Raises:
        HostError: it cannot be made.
    """
    with _owned(runtime_root(), "", re.sub(r"[^A-Za-z0-9_]", "", name)[:16] or "board") as made:
        yield made


@contextmanager
def work_directory(purpose: str) -> Iterator[Path]:
    """Make a directory among the temporary files that exists as long as the context; remove what a
    killed process left for the same purpose.

    Raises:
        HostError: it cannot be made.
    """
    with _owned(Path(tempfile.gettempdir()), f"stillframe-{purpose}-", "") as made:
        yield made


@contextmanager
def _owned(root: Path, prefix: str, name: str) -> Iterator[Path]:
    sweep(root, prefix)
    directory = root / f"{prefix}{name}{'-' if name else ''}{secrets.token_hex(3)}"
    lock_fd = make_owned(directory)
    try:
        yield directory
    finally:
        remove(directory)
        os.close(lock_fd)


def runtime_root() -> Path:
    """Return where sockets of VMs go that Stillframe starts; the directory may not exist yet.

    Raises:
        HostError: the usual directory belongs to another user, or is open to others.
    """
    given = os.environ.get("XDG_RUNTIME_DIR", "")
    if given.startswith("/") and _is_own(Path(given)):
        return Path(given) / "stillframe"
    if os.geteuid() == 0 and Path("/run").is_dir():
        return ROOTS_RUN
    root = Path(f"/tmp/stillframe-{os.geteuid()}")
    if os.path.lexists(root) and not _is_own(root):
        raise HostError(
            f"{root} belongs to somebody else, or is open to others", remedy="set XDG_RUNTIME_DIR"
        )
    return root


def make_owned(directory: Path, run_as: RunAs | None = None) -> int:
    """Make a private directory, and its parents as needed.

    Args:
        run_as: another user, who becomes its owner.

    Returns:
        The descriptor that holds the lock. The process that has or inherits it owns the directory.

    Raises:
        HostError: not possible.
    """
    # It gets its name only when locked, so that no sweep takes it for a leftover.
    nameless = directory.with_name(f".{directory.name}.new")
    make_directory(nameless, run_as)
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
        prefix: of their names, in a root that others use, too.
    """
    with contextlib.suppress(OSError):
        for directory in root.iterdir():
            if directory.name.startswith(prefix) and not directory.name.startswith("."):
                _sweep_one(directory)


def _sweep_one(directory: Path) -> None:
    with contextlib.suppress(OSError):
        status = directory.lstat()
        is_ours = status.st_uid == os.geteuid() or (
            os.geteuid() == 0 and directory.parent == ROOTS_RUN
        )
        if not stat.S_ISDIR(status.st_mode) or not is_ours:
            return
        lock_fd = os.open(directory / _LOCK, os.O_RDWR | os.O_NOFOLLOW | os.O_CLOEXEC)
        try:
            fcntl.flock(lock_fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
            remove(directory)
        finally:
            os.close(lock_fd)


def remove(directory: Path) -> None:
    """Remove a directory with all that is in it; the lock goes last, so that a later sweep finds
    what an attempt left. Never raises."""
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


def make_parents(path: Path) -> None:
    """Make the directories above ``path``, private, as needed.

    Raises:
        HostError: not possible.
    """
    try:
        path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
    except OSError as error:
        raise HostError(f"cannot make the directory {path.parent}", why=error.strerror) from error


def make_directory(path: Path, run_as: RunAs | None = None) -> None:
    """Make a private directory, and the ones above it as needed.

    Args:
        run_as: another user, who becomes its owner and may pass through our roots above it.

    Raises:
        HostError: not possible.
    """
    try:
        path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
        path.mkdir(mode=0o700)
        if run_as is not None:
            for above in (ROOTS_RUN, ROOTS_STATE, ROOTS_STATE / "restored"):
                if above in path.parents:
                    above.chmod(PASSABLE)
            os.chown(path, run_as.uid, run_as.gid)
    except OSError as error:
        raise HostError(f"cannot make the directory {path}", why=error.strerror) from error


def _is_own(path: Path) -> bool:
    with contextlib.suppress(OSError):
        status = path.lstat()
        return (
            stat.S_ISDIR(status.st_mode)
            and status.st_uid == os.geteuid()
            and not status.st_mode & (stat.S_IWGRP | stat.S_IWOTH)
        )
    return False
