"""A running board's nameplate: a memfd that other processes read through ``/proc``.

The kernel shows the memfd's name (``/proc/PID/fd``), so a reader finds a board, even one inside
another program, without asking it or running any of its code. The kernel removes the nameplate
with the process. Like a QEMU command line, it is only a claim by the user who started the process:
the reader checks on the connected socket that the monitor is that process's own.
Source: memfd_create(2), fcntl(2) (file seals), proc(5).
"""

from __future__ import annotations

import contextlib
import fcntl
import os
from pathlib import Path

import msgspec

MEMFD_NAME = "stillframe-board"
"""The name of the nameplate's memfd; no RAM block's memfd has it."""

_TARGET = f"/memfd:{MEMFD_NAME} (deleted)"
_MOST_BYTES = 256 << 10
_MOST_PLATES = 16
_SEALS = fcntl.F_SEAL_WRITE | fcntl.F_SEAL_GROW | fcntl.F_SEAL_SHRINK | fcntl.F_SEAL_SEAL


class Nameplate(msgspec.Struct, frozen=True, kw_only=True):
    """A running board, as its nameplate describes it.

    ``pid``: the process's, in its own namespace, so that a forked child does not pass for a board.
    ``command``: the words that start such a board (``board_command.BoardCommand.words``). ``qmp``:
    the monitor's socket path as the process sees it; None without a monitor.
    """

    pid: int
    name: str
    command: tuple[str, ...]
    ram_bytes: int
    qmp: str | None = None


class PublishedNameplate:
    """A nameplate that other processes can read until ``close``, or until this one ends."""

    def __init__(self, nameplate: Nameplate) -> None:
        """Publish it.

        Raises:
            OSError: out of descriptors or memory.
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
    """Return a process's nameplates (``/proc/PID``), by descriptor: usually none, a board's one.

    Raises:
        PermissionError: this process may not inspect that one.
    """
    found: list[Nameplate] = []
    try:
        numbers = sorted(int(name.name) for name in (process / "fd").iterdir())
    except PermissionError:
        raise
    except OSError:
        return []
    for number in numbers:
        # The descriptor was closed meanwhile, or a memfd of that name holds something else.
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
    """Return the process's pids in all of its namespaces."""
    for line in (process / "status").read_text().splitlines():
        if line.startswith("NSpid:"):
            return {int(number) for number in line.split()[1:]}
    return {int(process.name)}
