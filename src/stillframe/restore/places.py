"""The places of a restored VM's sockets, log and overlays."""

from __future__ import annotations

import os
import re
import secrets
from pathlib import Path

import msgspec

from stillframe.errors import UsageError
from stillframe.qmp.listening import check_free
from stillframe.restore.private_directories import ROOTS_RUN, ROOTS_STATE, runtime_root
from stillframe.restore.records import RunAs
from stillframe.still.host_mark import state_directory

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


def choose_places(
    name: str, directory: Path | None, *, log_name: str = "qemu.log", run_as: RunAs | None = None
) -> Places:
    """Choose new names for the directories; nothing is created.

    Args:
        name: of the VM, as a hint for people.
        directory: the caller's choice for everything; it must not exist.
        run_as: another user, who must get there.

    Raises:
        UsageError: ``directory`` exists.
        HostError: the usual directory belongs to another user.
    """
    if directory is not None:
        directory = directory.absolute()
        if os.path.lexists(directory):
            raise UsageError(f"{directory} exists already", remedy="name a new directory")
        return Places(run=directory, disks=directory, log_name=log_name)
    entry = f"{re.sub(r'[^A-Za-z0-9_]', '', name)[:16] or 'vm'}-{secrets.token_hex(3)}"
    run = runtime_root() if run_as is None else ROOTS_RUN
    disks = state_directory() if run_as is None else ROOTS_STATE
    return Places(run=run / entry, disks=disks / "restored" / entry, log_name=log_name)


def private_name(name: str) -> str:
    """Return ``name`` as a part of a file name."""
    return re.sub(r"[^A-Za-z0-9_.-]", "_", name).lstrip(".")[:24] or "unnamed"


def check_socket_path(path: str, *, made_later: bool = False) -> None:
    """Check that a unix socket can be bound there.

    Args:
        made_later: its directory does not exist yet.

    A socket file on which nothing listens any more counts as free: binding there replaces it, as
    QEMU does. QEMU would also replace the socket of a VM that still listens.

    Raises:
        UsageError: too long, something else has that name, or there is no directory for it.
        BusyError: another process listens there.
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
