"""The directory in which a QEMU was started: the base of its command line's relative paths.

A daemonized or chrooted QEMU has changed its working directory. Its open files still show their
paths, and its environment the shell's directory (QEMU ``os-posix.c``: os_setup_post).
"""

from __future__ import annotations

import os
import re
from collections.abc import Iterable, Sequence
from pathlib import Path

from stillframe.machine.process.inspection import fd_targets
from stillframe.machine.qemu.options import Option, split

_PLAIN_FILES = frozenset({"", "hda", "hdb", "hdc", "hdd", "cdrom", "kernel", "initrd", "bios"})
_FILE_KEYS = re.compile(r"(?:.*\.)?(?:file|filename|path|mem-path)")
_SOCKET = re.compile(r"unix:([^,]+)")


def start_directory(pid: int, argv: Sequence[str]) -> Path:
    """Return the start directory, as far as it can be determined; for a QEMU that stays in it, the
    present one.

    Raises:
        OSError: we may not inspect the process, or it is gone.
        HostError, MachineError: the same.
    """
    process = Path(f"/proc/{pid}")
    now = (process / "cwd").readlink()
    line = split(argv)
    relative = [path for path in _paths(line) if not path.startswith("/")]
    moved = chroots(argv) or any(option.name == "daemonize" for option in line)
    if not relative or not moved:
        return now
    targets = fd_targets(pid)
    candidates = [now]
    for path in relative:
        end = "/" + os.path.normpath(path)
        candidates += [Path(t[: -len(end)] or "/") for t in targets if t.endswith(end)]
    candidates += _from_environment(process)
    candidates += [Path(target).parent for target in targets if target.startswith("/")]
    candidates += [Path(path).parent for path in _paths(line) if path.startswith("/")]
    return max(
        dict.fromkeys(candidates),
        key=lambda place: sum(os.path.lexists(place / path) for path in relative),
    )


def chroots(argv: Sequence[str]) -> bool:
    """Return whether a QEMU changes its root directory itself, once it has opened everything."""
    return any(
        option.name == "chroot" or (option.name == "run-with" and "chroot" in option.fields())
        for option in split(argv)
    )


def _paths(line: Iterable[Option]) -> list[str]:
    found = []
    for option in line:
        found += _SOCKET.findall(option.value)
        if option.name in _PLAIN_FILES or option.name in ("pidfile", "readconfig"):
            found.append(option.value)
        found += [
            value.removeprefix("file:")
            for key, value in option.fields().items()
            if _FILE_KEYS.fullmatch(key)
        ]
    return [path for path in found if path]


def _from_environment(process: Path) -> list[Path]:
    try:
        words = (process / "environ").read_bytes().split(b"\0")
    except OSError:
        return []
    found = dict(word.partition(b"=")[::2] for word in words)
    return [
        Path(os.fsdecode(found[name]))
        for name in (b"PWD", b"OLDPWD")
        if found.get(name, b"").startswith(b"/")
    ]
