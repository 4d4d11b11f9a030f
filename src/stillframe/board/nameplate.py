"""What a board tells whoever looks at its process: a nameplate in a memfd, read through ``/proc``.

Its name there is the kernel's (``/proc/PID/fd``), so a board is found without asking or running
anything of it, also one inside another program. The kernel removes it with the process. Like a
QEMU's command line it is the word of whoever started the process: whoever reads it checks by the
connected socket that the monitor is that process's own.
Source: memfd_create(2), fcntl(2) (file seals), proc(5).
"""

from __future__ import annotations

import contextlib
import fcntl
import os
from pathlib import Path

import msgspec

MEMFD_NAME = "stillframe-board"
"""Names the memfd that holds the nameplate; a RAM block's memfd is called otherwise."""

_TARGET = f"/memfd:{MEMFD_NAME} (deleted)"
_MOST_BYTES = 256 << 10
_MOST_PLATES = 16
_SEALS = fcntl.F_SEAL_WRITE | fcntl.F_SEAL_GROW | fcntl.F_SEAL_SHRINK | fcntl.F_SEAL_SEAL


class Nameplate(msgspec.Struct, frozen=True, kw_only=True):
    """A running board as its nameplate tells.

    ``pid``: of its process, in its own namespace: a forked child is no board. ``command``: the
    words that would start such a board (``board_command.BoardCommand.words``). ``qmp``: where its
    monitor listens, as it sees the path; None if it has none.
    """

    pid: int
    name: str
    command: tuple[str, ...]
    ram_bytes: int
    qmp: str | None = None


class PublishedNameplate:
    """A nameplate that others see until ``close``, or until the process ends."""

    def __init__(self, nameplate: Nameplate) -> None:
        """Publish it.

        Raises:
            OSError: no descriptor or memory is left.
        """
        self._fd = os.memfd_create(MEMFD_NAME, os.MFD_CLOEXEC | os.MFD_ALLOW_SEALING)
        try:
            os.write(self._fd, msgspec.json.encode(nameplate))
            fcntl.fcntl(self._fd, fcntl.F_ADD_SEALS, _SEALS)
        except BaseException:
            self.close()
            raise

    def close(self) -> None:
        """Withdraw it; does nothing the second time."""
        if self._fd >= 0:
            os.close(self._fd)
            self._fd = -1


def read_nameplates(process: Path) -> list[Nameplate]:
    """The nameplates of a process (``/proc/PID``), by descriptor; most have none, a board one.

    Raises:
        PermissionError: the process may not be looked into.
    """
    found: list[Nameplate] = []
    try:
        numbers = sorted(int(name.name) for name in (process / "fd").iterdir())
    except PermissionError:
        raise
    except OSError:
        return []
    for number in numbers:
        # Closed meanwhile; or a memfd of that name that holds something else.
        with contextlib.suppress(OSError, msgspec.MsgspecError, UnicodeError):
            path = process / "fd" / str(number)
            if str(path.readlink()) == _TARGET and len(found) < _MOST_PLATES:
                plate = msgspec.json.decode(_content(path), type=Nameplate)
                if plate.pid in _own_pids(process):
                    found.append(plate)
    return found


def _content(path: Path) -> bytes:
    fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC | os.O_NONBLOCK)
    try:
        return os.pread(fd, _MOST_BYTES, 0)
    finally:
        os.close(fd)


def _own_pids(process: Path) -> set[int]:
    """The process's numbers in all of its namespaces."""
    for line in (process / "status").read_text().splitlines():
        if line.startswith("NSpid:"):
            return {int(number) for number in line.split()[1:]}
    return {int(process.name)}
