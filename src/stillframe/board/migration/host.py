"""The host of a board: the board with its migration and QMP server, run by one process."""

from __future__ import annotations

import os

from stillframe.board.board_command import command_of
from stillframe.board.hardware.board import Board
from stillframe.board.hardware.config import BoardConfig
from stillframe.board.memory.own_protection import Preference
from stillframe.board.migration.commands import add_migration_commands
from stillframe.board.migration.engine import Migration
from stillframe.board.monitor.board_commands import add_board_commands
from stillframe.board.monitor.command_set import CommandTable
from stillframe.board.monitor.descriptors import InheritedDescriptors
from stillframe.board.monitor.server import QmpServer
from stillframe.board.nameplate import Nameplate, PublishedNameplate
from stillframe.errors import HostError, StillframeError
from stillframe.qmp.connection import Address
from stillframe.version import __version__

_DEFER = "defer"


class BoardHost:
    """A running board with migration and QMP; made by ``start_host``.

    End it with ``close``, or use it as a context manager.

    Attributes:
        qmp_address: where the QMP server listens, or None.
    """

    def __init__(
        self, board: Board, migration: Migration, server: QmpServer, qmp_address: Address | None
    ) -> None:
        self.board = board
        self.migration = migration
        self.server = server
        self.qmp_address = qmp_address
        self._incoming_error: StillframeError | None = None
        self._plate: PublishedNameplate | None = None

    def publish_nameplate(self) -> None:
        """Publish how other programs find this board by its process (``ps``, ``take``).

        Raises:
            HostError: no memory or descriptor for the nameplate.
        """
        address = self.qmp_address
        plate = Nameplate(
            pid=os.getpid(),
            name=self.board.name,
            command=self.board.config.argv or command_of(self.board.config).words(),
            ram_bytes=self.board.config.ram_bytes,
            qmp=address if isinstance(address, str) else None,
        )
        try:
            self._plate = PublishedNameplate(plate)
        except OSError as error:
            raise HostError("no nameplate for the board", why=error.strerror) from error

    def take_incoming(self, uri: str) -> None:
        """Wait for an incoming migration. A failed load ends the board, as with QEMU's
        ``-incoming``: there is no other guest to run.

        Raises:
            StillframeError: as ``Migration.incoming``.
        """
        self.migration.incoming(uri, fds=InheritedDescriptors(), on_failure=self._incoming_failed)

    def _incoming_failed(self, error: StillframeError) -> None:
        self._incoming_error = error
        self.board.quit()

    def wait(self, timeout_s: float | None = None) -> bool:
        """Wait until the machine has ended.

        Returns:
            Whether it has ended; ``board.exit_status`` says how.

        Raises:
            StillframeError: the incoming migration it was started for failed.
        """
        ended = self.board.wait(timeout_s)
        if self._incoming_error is not None:
            raise self._incoming_error
        return ended

    def close(self) -> None:
        """End migration, server and board, in this order. Never raises; may be repeated."""
        self.migration.close()
        self.server.close()
        self.board.close()
        if self._plate is not None:
            self._plate.close()

    def __enter__(self) -> BoardHost:
        return self

    def __exit__(self, *_error: object) -> None:
        self.close()


def start_host(
    config: BoardConfig,
    *,
    qmp: Address | None = None,
    incoming: str | None = None,
    paused: bool = False,
    protection_prefer: Preference = "auto",
) -> BoardHost:
    """Create a board, serve QMP for it, and start it.

    Args:
        qmp: a unix socket's path or (host, port) to serve QMP on.
        incoming: the URI of a stream to load instead of starting the guest; ``defer`` waits for
            the QMP command ``migrate-incoming``.
        paused: whether the guest waits for ``cont`` before it runs.
        protection_prefer: how to write-protect RAM; see ``open_own_protection``.

    Raises:
        StillframeError: the board, the socket or the stream's source is not available; nothing is
            left behind.
    """
    board = Board(config)
    commands = CommandTable(board.lock)
    migration = Migration(board, protection_prefer=protection_prefer)
    add_board_commands(commands, board, migrating=lambda: migration.under_way)
    add_migration_commands(commands, migration)
    major, minor, micro = (int(part) for part in __version__.split(".")[:3])
    server = QmpServer(commands, version=(major, minor, micro), package=f"stillframe {__version__}")
    host = BoardHost(board, migration, server, None)
    try:
        board.on_quit(migration.give_up)
        board.on_end(migration.close)  # while RAM still exists
        board.add_listener(server.emit)
        migration.add_listener(server.emit)
        if qmp is not None:
            host.qmp_address = server.listen(qmp)
        host.publish_nameplate()
        if incoming is None:
            board.power_on(paused=paused)
        else:
            board.start_incoming(paused=paused)
            if incoming != _DEFER:
                host.take_incoming(incoming)
    except BaseException:
        host.close()
        raise
    return host
