"""A board in this process, which other programs can find, drive and snapshot."""

from __future__ import annotations

import importlib.util
import os
import re
import stat
from contextlib import ExitStack
from pathlib import Path
from typing import TYPE_CHECKING

from stillframe.board.board_command import BoardCommand
from stillframe.board.guests import GUEST_NAMES, guest_path
from stillframe.board.hardware.config import BoardConfig
from stillframe.board.hardware.layout import SECTOR_BYTES
from stillframe.errors import HostError, NotFoundError, UsageError
from stillframe.restore.places import check_socket_path
from stillframe.restore.private_directories import socket_directory
from stillframe.store.backends.local import LocalSink
from stillframe.store.backends.local_source import LocalSource

if TYPE_CHECKING:
    from stillframe.board.hardware.framebuffer import Picture
    from stillframe.board.migration.host import BoardHost
    from stillframe.machine import Machine

_UNIX = "unix:"
_URI = re.compile(r"(?:tcp|unix|fd|file|exec|rdma|vsock):|defer$")
"""What QEMU takes as a migration URI; anything else is a file name."""


def check_engine() -> None:
    """Check that a board can run, without importing the engine.

    Raises:
        HostError: the extra ``board`` is not installed.
    """
    if importlib.util.find_spec("unicorn") is None:
        raise HostError(
            "our own VM needs the Unicorn engine, which is not installed",
            remedy="pip install 'stillframe[board]'",
        )


class RunningBoard:
    """A board in this process; made by ``board.start``. Use it as a context manager.

    Attributes:
        name: as in ``ps``. command: its start options. qmp: its monitor's socket path.
    """

    def __init__(
        self, command: BoardCommand, *, qmp: str | None, incoming: str | None, paused: bool
    ) -> None:
        """Start the board.

        Args:
            command: the board; its paths are absolute.
            qmp: the monitor's socket path; None for a private one.
            incoming: a snapshot file, a file with a stream, or a URI.
            paused: do not run the guest before ``cont``.

        Raises:
            UsageError: there is nothing to run, or the options do not go together.
            HostError: the engine is missing, or a file, a socket or memory is not available.
            BusyError: another program listens on one of its sockets.
            SinkError: the picture cannot be written to its file.
            NotFoundError, DataError: the guest, the disk or the incoming state cannot be read.
        """
        if command.guest is None and incoming is None:
            raise UsageError(
                "a board needs a guest",
                remedy=f"name an ELF file, or one of {', '.join(GUEST_NAMES)}",
            )
        check_engine()
        _check_files(command)
        self.command = command
        self.name = command.name or _called_after(command.guest)
        self._last: Picture | None = None
        config = BoardConfig(
            name=self.name,
            guest_path=_guest_file(command.guest),
            command_line=command.append,
            ram_bytes=command.ram_bytes,
            vcpus=command.vcpus,
            disk_path=command.disk,
            serial=command.serial,
            display_width=command.resolution[0],
            display_height=command.resolution[1],
            argv=command.words(),
        )
        with ExitStack() as cleanup:
            if qmp is None:
                directory = cleanup.enter_context(socket_directory(self.name))
                self.qmp = str(directory / "qmp.sock")
            else:
                self.qmp = str(Path(qmp).absolute())
                check_socket_path(self.qmp)
            self._host = cleanup.enter_context(
                _start(config, self.qmp, _uri(incoming), paused, command)
            )
            if command.display is not None:
                self._host.board.on_end(self._keep_picture)
            self._cleanup = cleanup.pop_all()

    def _keep_picture(self) -> None:
        # Once the board has ended, its RAM is gone.
        self._last = self._host.board.picture()

    def wait(self, timeout_s: float | None = None) -> bool:
        """Wait for the board's end; return whether it came in time. ``exit_status`` tells how.

        Raises:
            StillframeError: the incoming state could not be loaded.
        """
        return self._host.wait(timeout_s)

    @property
    def exit_status(self) -> int:
        """The guest's own if it powered off; 134 if it panicked, 70 if the board failed; else 0."""
        status = self._host.board.exit_status
        return 0 if status is None else status

    @property
    def host(self) -> BoardHost:
        """The machine, its migration and its monitor, for programs that drive them directly."""
        return self._host

    @property
    def machine(self) -> Machine:
        """The board as a machine for ``stillframe.take``."""
        from stillframe.board.local_board import LocalBoard  # imports the engine

        return LocalBoard(self._host.board, protection=self.command.protection)

    def picture(self) -> Picture:
        """Return what the display shows, or last showed."""
        return self._last or self._host.board.picture()

    def save_picture(self, path: str | os.PathLike[str]) -> None:
        """Write the picture as a PNG, mode 0600, complete or not at all; replace an existing file.

        Raises:
            SinkError: it cannot be written.
        """
        sink = LocalSink(path, overwrite=True)
        try:
            sink.write(self.picture().png())
            sink.commit()
        finally:
            sink.abort()

    def close(self) -> None:
        """End the board, if it has not ended; never raises, and does nothing the second time."""
        self._cleanup.close()

    def __enter__(self) -> RunningBoard:
        return self

    def __exit__(self, *_error: object) -> None:
        self.close()


def _start(
    config: BoardConfig, qmp: str, incoming: str | None, paused: bool, command: BoardCommand
) -> BoardHost:
    from stillframe.board.migration.host import start_host  # imports the engine

    return start_host(
        config, qmp=qmp, incoming=incoming, paused=paused, protection_prefer=command.protection
    )


def _called_after(guest: str | None) -> str:
    return Path(guest).stem if guest is not None else "board"


def _guest_file(guest: str | None) -> str | None:
    return str(guest_path(guest)) if guest in GUEST_NAMES else guest


def _uri(incoming: str | None) -> str | None:
    """Return ``incoming`` as a URI, which turns a file name into a ``file:`` one.

    Raises:
        NotFoundError, UsageError, HostError: the file is missing, not a file, or not readable.
    """
    if incoming is None or _URI.match(incoming):
        return incoming
    LocalSource(incoming).close()
    return f"file:{Path(incoming).absolute()}"


def _check_files(command: BoardCommand) -> None:
    """Check the disk, the serial line's socket and the picture's file; leave nothing behind.

    Raises:
        NotFoundError: the disk does not exist.
        UsageError: a path is bad or not a file, or the disk is not whole sectors.
        BusyError: another program listens on the socket.
        HostError: the disk cannot be opened for reading and writing.
        SinkError: the picture cannot be written there.
    """
    if command.disk is not None:
        _check_disk(command.disk)
    if command.serial.startswith(_UNIX):
        check_socket_path(command.serial.removeprefix(_UNIX))
    if command.display not in (None, "terminal"):
        LocalSink(command.display, overwrite=True).abort()


def _check_disk(path: str) -> None:
    try:
        # Non-blocking, so that a named pipe is refused at once.
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
    if not length_bytes or length_bytes % SECTOR_BYTES:
        raise UsageError(
            f"the disk {path} has {length_bytes} bytes",
            why=f"a disk is whole sectors of {SECTOR_BYTES} bytes, one at least",
            remedy=f"'truncate -s %{SECTOR_BYTES}' makes it longer",
        )
