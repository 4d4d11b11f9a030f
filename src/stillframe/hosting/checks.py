"""What a board is given, looked at before anything is made: better told now than at the end."""

from __future__ import annotations

import os
import stat

from stillframe.errors import HostError, NotFoundError, UsageError
from stillframe.machine.board.board_command import BoardCommand
from stillframe.restore.places import check_socket_path
from stillframe.store.backends.local import LocalSink
from stillframe.store.backends.local_source import LocalSource

_SECTOR_BYTES = 512
_UNIX = "unix:"


def check_files(command: BoardCommand) -> None:
    """Check the disk, the serial line's socket and the picture's place; nothing is left behind.

    Raises:
        NotFoundError: no such disk.
        UsageError: a file that is none, a disk that is not whole sectors, a bad socket path.
        BusyError: somebody listens on the socket.
        HostError: the disk may not be read and written.
        SinkError: the picture cannot be written there.
    """
    if command.disk is not None:
        _check_disk(command.disk)
    if command.serial.startswith(_UNIX):
        check_socket_path(command.serial.removeprefix(_UNIX))
    if command.display not in (None, "terminal"):
        LocalSink(command.display, overwrite=True).abort()


def check_incoming(path: str) -> None:
    """Check that a file with what is to come in is one that can be read.

    Raises:
        NotFoundError, UsageError, HostError: as ``LocalSource``.
    """
    LocalSource(path).close()


def _check_disk(path: str) -> None:
    try:
        # Not blocking, so that a named pipe is refused rather than waited for.
        fd = os.open(path, os.O_RDWR | os.O_CLOEXEC | os.O_NOCTTY | os.O_NONBLOCK)
    except (FileNotFoundError, NotADirectoryError) as error:
        raise NotFoundError(f"there is no disk {path}") from error
    except IsADirectoryError as error:
        raise UsageError(f"the disk {path} is a directory", remedy="name a raw image") from error
    except OSError as error:
        raise HostError(f"the disk {path} cannot be opened", why=error.strerror) from error
    try:
        status = os.fstat(fd)
        if not (stat.S_ISREG(status.st_mode) or stat.S_ISBLK(status.st_mode)):
            raise UsageError(
                f"the disk {path} is neither a regular file nor a block device",
                remedy="name a raw image",
            )
        length_bytes = os.lseek(fd, 0, os.SEEK_END)
    finally:
        os.close(fd)
    if not length_bytes or length_bytes % _SECTOR_BYTES:
        raise UsageError(
            f"the disk {path} has {length_bytes} bytes",
            why=f"a disk is whole sectors of {_SECTOR_BYTES} bytes, one at least",
            remedy=f"'truncate -s %{_SECTOR_BYTES}' makes it longer",
        )
