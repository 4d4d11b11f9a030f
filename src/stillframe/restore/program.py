"""The programs that a restore may run: found on this host, never taken from the file as given."""

from __future__ import annotations

import os
import re
import shutil
import stat
from pathlib import Path

from stillframe.errors import HostError, TrustError

STANDARD_DIRECTORIES = (
    "/usr/bin",
    "/usr/local/bin",
    "/usr/libexec",
    "/usr/local/libexec",
    "/usr/sbin",
    "/bin",
    "/run/current-system/sw/bin",
)
_LIBRARIES = ("LD_LIBRARY_PATH", "QEMU_MODULE_DIR")
_EMULATOR = re.compile(r"qemu-system-[A-Za-z0-9_]+(?:-[A-Za-z0-9_]+)*|qemu-kvm|kvm")


def find_emulator(recorded: str, given: str | None = None) -> str:
    """Return the path of the QEMU to start.

    Args:
        recorded: the path in the snapshot; only its last part says which emulator, unless it is
            in one of the standard directories.
        given: the caller's own choice (name or path), which wins.

    Raises:
        TrustError: the snapshot names a program that is not a QEMU system emulator.
        HostError: there is none on this host, or others could have changed it.
    """
    if given is not None:
        found = shutil.which(given)
        if found is None:
            raise HostError(f"there is no program {given!r}", remedy="name an installed QEMU")
        return str(Path(found).absolute())
    name = recorded.rpartition("/")[2]
    if not _EMULATOR.fullmatch(name):
        raise TrustError(
            f"the snapshot's program {recorded!r} is no QEMU system emulator",
            remedy="name the QEMU to start yourself",
        )
    return find_standard(name, preferred=recorded)


def program_of(pid: int) -> tuple[str | None, dict[str, str]]:
    """Return the emulator that a VM of this host runs, for clones of it, and the part of its
    environment that finds the program's libraries (ld.so(8); QEMU ``util/module.c``).

    Returns:
        None and nothing if that file is gone, has another name, or could be changed by others.
    """
    process = Path(f"/proc/{pid}")
    try:
        path = (process / "exe").readlink()
        if not path.samefile(process / "exe") or not _EMULATOR.fullmatch(path.name):
            return None, {}
        _check_unchanged_by_others(path)
        words = (process / "environ").read_bytes().split(b"\0")
    except (OSError, HostError):
        return None, {}
    pairs = (os.fsdecode(word).partition("=") for word in words)
    return str(path), {key: value for key, _, value in pairs if key in _LIBRARIES}


def find_standard(name: str, *, preferred: str = "") -> str:
    """Return a program in the standard directories that only root or the caller can change.

    Raises:
        HostError: there is none, or others could have changed it.
    """
    places = [f"{directory}/{name}" for directory in STANDARD_DIRECTORIES]
    if preferred in places:
        places.insert(0, preferred)
    for place in places:
        if os.access(place, os.X_OK) and Path(place).is_file():
            _check_unchanged_by_others(Path(place))
            return place
    raise HostError(
        f"there is no program {name} in {', '.join(STANDARD_DIRECTORIES)}",
        remedy="install it, or name another one yourself",
    )


def _check_unchanged_by_others(path: Path) -> None:
    real = path.resolve()
    for entry in (real, real.parent):
        status = entry.stat()
        if status.st_mode & stat.S_IWOTH or status.st_uid not in (0, os.geteuid()):
            raise HostError(
                f"will not run {path}",
                why=f"others than root and you can change {entry}",
                remedy="mend its owner and mode, or name another program yourself",
            )
