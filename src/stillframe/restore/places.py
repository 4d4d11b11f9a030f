"""Where a restored VM's sockets, log and overlays go."""

from __future__ import annotations

import contextlib
import os
import re
import secrets
import stat
from pathlib import Path

import msgspec

from stillframe.errors import HostError, UsageError
from stillframe.qmp.listening import check_free

SUN_PATH_BYTES = 107
"""Longest path that fits a ``sockaddr_un`` (unix(7))."""


class Places(msgspec.Struct, frozen=True, kw_only=True):
    """Directories of one restore, not made yet. ``run``: sockets and log. ``disks``: overlays."""

    run: Path
    disks: Path
    log_name: str = "qemu.log"

    @property
    def qmp(self) -> Path:
        return self.run / "qmp.sock"

    @property
    def log(self) -> Path:
        return self.run / self.log_name


def choose_places(name: str, directory: Path | None, *, log_name: str = "qemu.log") -> Places:
    """New names for the directories; nothing is made.

    Args:
        name: of the VM, for people who look.
        directory: the caller's choice for everything; it must not exist.

    Raises:
        UsageError: ``directory`` exists.
        HostError: the usual directory belongs to somebody else.
    """
    if directory is not None:
        directory = directory.absolute()
        if os.path.lexists(directory):
            raise UsageError(f"{directory} exists already", remedy="name a new directory")
        return Places(run=directory, disks=directory, log_name=log_name)
    entry = f"{re.sub(r'[^A-Za-z0-9_]', '', name)[:16] or 'vm'}-{secrets.token_hex(3)}"
    return Places(run=runtime_root() / entry, disks=_state_root() / entry, log_name=log_name)


def private_name(name: str) -> str:
    """``name`` as a part of a file name."""
    return re.sub(r"[^A-Za-z0-9_.-]", "_", name).lstrip(".")[:24] or "unnamed"


def check_socket_path(path: str, *, made_later: bool = False) -> None:
    """Check that a unix socket can be bound there.

    Args:
        made_later: its directory is not there yet.

    A socket file on which nobody listens any more counts as free: whoever binds there replaces it,
    as QEMU does. QEMU would do so also under the nose of a VM that listens there.

    Raises:
        UsageError: too long, there is something of that name, or no directory for it.
        BusyError: somebody listens there.
    """
    length = len(os.fsencode(path))
    if length > SUN_PATH_BYTES:
        raise UsageError(
            f"the socket path {path} is too long",
            why=f"it has {length} bytes, {SUN_PATH_BYTES} are possible",
            remedy="choose a shorter one, or a shorter directory",
        )
    if made_later:
        return
    if not Path(path).parent.is_dir():
        raise UsageError(f"there is no directory for the socket {path}")
    check_free(path)


def make_directory(path: Path) -> None:
    """Make a private directory; the ones above it as needed.

    Raises:
        HostError: not possible.
    """
    try:
        path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
        path.mkdir(mode=0o700)
    except OSError as error:
        raise HostError(f"cannot make the directory {path}", why=error.strerror) from error


def runtime_root() -> Path:
    """Where sockets of VMs go that Stillframe starts; it may have to be made.

    Raises:
        HostError: the usual directory belongs to somebody else.
    """
    given = os.environ.get("XDG_RUNTIME_DIR", "")
    if given.startswith("/") and _is_own(Path(given)):
        return Path(given) / "stillframe"
    if os.geteuid() == 0 and Path("/run").is_dir():
        return Path("/run/stillframe")
    root = Path(f"/tmp/stillframe-{os.geteuid()}")
    if os.path.lexists(root) and not _is_own(root):
        raise HostError(
            f"{root} belongs to somebody else, or is open to others", remedy="set XDG_RUNTIME_DIR"
        )
    return root


def _state_root() -> Path:
    given = os.environ.get("XDG_STATE_HOME", "")
    if given.startswith("/"):
        return Path(given) / "stillframe" / "restored"
    if os.geteuid() == 0:
        return Path("/var/lib/stillframe/restored")
    home = Path(os.path.expanduser("~"))  # noqa: PTH111 - Path.home() raises without a home
    if not home.is_absolute():
        raise HostError("there is no home directory", remedy="set XDG_STATE_HOME")
    return home / ".local" / "state" / "stillframe" / "restored"


def _is_own(path: Path) -> bool:
    with contextlib.suppress(OSError):
        status = path.lstat()
        return (
            stat.S_ISDIR(status.st_mode)
            and status.st_uid == os.geteuid()
            and not status.st_mode & (stat.S_IWGRP | stat.S_IWOTH)
        )
    return False
