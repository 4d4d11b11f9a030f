"""A board that runs in this process, and that others find, drive and snapshot."""

from __future__ import annotations

import importlib.util
import os
import re
from contextlib import ExitStack
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING

from stillframe.errors import HostError, UsageError
from stillframe.hosting.checks import check_files, check_incoming
from stillframe.hosting.private_socket import PrivateSocket
from stillframe.machine.board.board_command import BoardCommand
from stillframe.machine.board.config import BoardConfig
from stillframe.machine.board.guests import GUEST_NAMES, guest_path
from stillframe.restore.places import check_socket_path
from stillframe.store.backends.local import LocalSink

if TYPE_CHECKING:
    from stillframe.machine.board.screenshot import Picture
    from stillframe.migration.host import BoardHost

_URI = re.compile(r"(?:tcp|unix|fd|file|exec|rdma|vsock):|defer$")
"""What QEMU takes for a migration URI; anything else is a file's name."""


def check_engine() -> None:
    """Find out whether a board can be run, without importing what runs it.

    Raises:
        HostError: the extra ``board`` is not installed.
    """
    if importlib.util.find_spec("unicorn") is None:
        raise HostError(
            "our own VM needs the Unicorn engine, which is not installed",
            remedy="pip install 'stillframe[board]'",
        )


class RunningBoard:
    """A board in this process; made by ``api.start_board``. Use it as a context manager.

    Attributes:
        name: as in ``ps``. command: what it was started with. qmp: where its monitor listens.
    """

    def __init__(
        self, command: BoardCommand, *, qmp: str | None, incoming: str | None, paused: bool
    ) -> None:
        """Start it.

        Args:
            command: the board; paths absolute.
            qmp: where its monitor is to listen; else in a private place.
            incoming: a snapshot file, a file with a stream, or a URI.
            paused: its guest waits for ``cont``.

        Raises:
            UsageError: there is nothing to run, or options do not go together.
            HostError: the engine is missing, or a file, a socket or memory is not to be had.
            BusyError: somebody listens on a socket that it is to have.
            SinkError: its picture cannot be written to the file that it names.
            NotFoundError, DataError: the guest, the disk, or what is to come in.
        """
        if command.guest is None and incoming is None:
            raise UsageError(
                "a board needs a guest",
                remedy=f"name an ELF file, or one of {', '.join(GUEST_NAMES)}",
            )
        check_engine()
        check_files(command)
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
                private = PrivateSocket(self.name)
                cleanup.callback(private.close)
                self.qmp = private.path
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
        # After its end there is no RAM to look into.
        self._last = self._host.board.picture()

    def wait(self, timeout_s: float | None = None) -> bool:
        """Wait for its end; whether it came in time. Then ``exit_status`` tells how.

        Raises:
            StillframeError: what was to come in could not be loaded.
        """
        return self._host.wait(timeout_s)

    @property
    def exit_status(self) -> int:
        """Of the guest that powered off; 134 if it panicked, 70 if the board failed; else 0."""
        status = self._host.board.exit_status
        return 0 if status is None else status

    @property
    def host(self) -> BoardHost:
        """The machine, its migration and its monitor, for programs that drive them directly."""
        return self._host

    def picture(self) -> Picture:
        """What its display shows, or showed last."""
        return self._last or self._host.board.picture()

    def save_picture(self, path: str | os.PathLike[str]) -> None:
        """Write a PNG of it, with mode 0600, complete or not at all; replaces a file of that name.

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
        """End it, if it has not ended; never raises, and does nothing the second time."""
        self._cleanup.close()

    def __enter__(self) -> RunningBoard:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.close()


def _start(
    config: BoardConfig, qmp: str, incoming: str | None, paused: bool, command: BoardCommand
) -> BoardHost:
    from stillframe.migration.host import start_host  # imports the engine

    return start_host(
        config, qmp=qmp, incoming=incoming, paused=paused, protection_prefer=command.protection
    )


def _called_after(guest: str | None) -> str:
    return Path(guest).stem if guest is not None else "board"


def _guest_file(guest: str | None) -> str | None:
    return str(guest_path(guest)) if guest in GUEST_NAMES else guest


def _uri(incoming: str | None) -> str | None:
    """A file's name as a URI.

    Raises:
        NotFoundError, UsageError, HostError: it is no file, or may not be read.
    """
    if incoming is None or _URI.match(incoming):
        return incoming
    check_incoming(incoming)
    return f"file:{Path(incoming).absolute()}"
