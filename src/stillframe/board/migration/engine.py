"""The board's migration: at most one at a time, outgoing or incoming."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING

from stillframe.board.memory.own_protection import Preference, open_own_protection
from stillframe.board.migration import query
from stillframe.board.migration.addresses import parse_uri
from stillframe.board.migration.background import save_in_background
from stillframe.board.migration.capabilities import EVENTS, POSTCOPY_RAM, Capabilities
from stillframe.board.migration.incoming import Incoming
from stillframe.board.migration.incoming_channel import expect
from stillframe.board.migration.incoming_postcopy import probe_missing_pages
from stillframe.board.migration.outgoing import Outgoing, Tell
from stillframe.board.migration.outgoing_channel import find_destination
from stillframe.board.migration.parameters import ParameterTable
from stillframe.board.migration.precopy import migrate_live
from stillframe.board.migration.ram_handler import RamHandler
from stillframe.board.monitor.descriptors import Descriptors
from stillframe.errors import BusyError, RefusedError, StillframeError
from stillframe.vmstate.wire import RAM_IDSTR, RAM_VERSION

if TYPE_CHECKING:
    from stillframe.board.hardware.board import Board

_END_S = 10.0
_IN_PROGRESS = "There's a migration process in progress"


class Migration:
    """The migration of one board. Any thread may call any method.

    Refusals use QEMU's wording (``migration/migration.c``: migrate_prepare, qmp_migrate,
    qmp_migrate_incoming, qmp_migrate_start_postcopy).

    Args:
        protection_prefer: how to write-protect RAM; see ``open_own_protection``.
    """

    def __init__(self, board: Board, *, protection_prefer: Preference = "auto") -> None:
        self._board = board
        self._protection: Preference = protection_prefer
        self._handler = RamHandler()
        board.registry.register(RAM_IDSTR, self._handler, version_id=RAM_VERSION, instance_id=0)
        self._lock = threading.Lock()
        self._listeners: list[Tell] = []
        self._outgoing: Outgoing | None = None
        self._incoming: Incoming | None = None
        self._capabilities = Capabilities(
            probe_write_tracking=lambda: open_own_protection(protection_prefer).close(),
            probe_missing_pages=lambda: probe_missing_pages(protection_prefer),
            waits_for_incoming=lambda: board.run_state == "inmigrate",
        )
        self.parameters = ParameterTable()

    @property
    def capabilities(self) -> Mapping[str, bool]:
        """All capabilities, and whether each is on."""
        return self._capabilities.as_dict()

    @property
    def under_way(self) -> bool:
        """Whether the machine is being migrated, saved or loaded: no RAM may be added meanwhile.

        A machine that still waits for its source may be given RAM.
        """
        incoming = self._incoming
        return self._under_way() or (incoming is not None and incoming.loading)

    def set_capabilities(self, wanted: Mapping[str, bool]) -> None:
        """Switch capabilities, all or none.

        Raises:
            BusyError: an outgoing migration is under way. UsageError: no such capability.
            RefusedError: they exclude each other, or the host does not support one.
        """
        with self._lock:
            if self._under_way():
                raise BusyError(_IN_PROGRESS)
            self._capabilities.set(wanted)

    def add_listener(self, callback: Tell) -> None:
        """Call ``callback`` for MIGRATION and MIGRATION_PASS events if ``events`` is on."""
        self._listeners.append(callback)

    def _tell(self, event: str, data: dict[str, object]) -> None:
        if self._capabilities[EVENTS]:
            for listener in tuple(self._listeners):
                listener(event, data)

    def _under_way(self) -> bool:
        return self._outgoing is not None and self._outgoing.control.under_way

    # --- outgoing ----------------------------------------------------------------------

    def migrate(self, uri: str, *, fds: Descriptors | None = None) -> None:
        """Start to migrate to ``uri``, or, with background-snapshot on, to save there.

        A thread does the work: see ``query`` and ``wait``. The guest's state does not change here.

        Args:
            fds: where ``fd:`` and ``file:/dev/fdset/N`` find their descriptors.

        Raises:
            UsageError: the URI is malformed. BusyError: a migration is under way.
            RefusedError: the machine cannot be migrated now. NotFoundError, SinkError: the
                destination cannot be opened; ``query`` reports this too.
        """
        address = parse_uri(uri)
        # The board's lock comes first everywhere: a QMP client's thread may already hold it.
        with self._board.lock, self._lock:
            self._check_may_leave()
            outgoing = Outgoing(
                self._board,
                self._handler,
                self._capabilities.as_dict(),
                self.parameters,
                protection=self._protection,
                tell=self._tell,
            )
            self._outgoing = outgoing
        try:
            departure = find_destination(address, fds or Descriptors(), outgoing.interrupt)
        except BaseException as error:
            outgoing.fail_early(error)
            raise
        outgoing.start(departure, save_in_background if outgoing.background else migrate_live)

    def _check_may_leave(self) -> None:
        if self._under_way():
            raise BusyError(_IN_PROGRESS)
        state = self._board.run_state
        if state == "inmigrate":
            raise RefusedError("Guest is waiting for an incoming migration", guest_state="paused")
        if state == "postmigrate":
            raise RefusedError(
                "Can't migrate the vm that was paused due to previous migration",
                guest_state="paused",
            )
        if self._incoming is not None and not self._incoming.ended.is_set():
            raise BusyError("Guest RAM is still coming in by postcopy", guest_state="running")
        for reason in self._board.blocked_reasons():
            raise RefusedError(reason)

    def cancel(self) -> None:
        """Cancel the outgoing migration, if there is one; the guest goes on here.

        Has no effect once the destination may run the guest.

        Raises:
            RefusedError: the guest already runs at the destination (postcopy).
        """
        outgoing = self._outgoing
        if outgoing is None:
            return
        outgoing.cancel()
        if outgoing.control.state == "postcopy-active":
            raise RefusedError(
                "Postcopy migration in progress, cannot cancel", guest_state="paused"
            )

    def start_postcopy(self) -> None:
        """Switch the current migration over to postcopy as soon as possible.

        Raises:
            RefusedError: the capability is off, or no migration was started.
        """
        if not self._capabilities[POSTCOPY_RAM]:
            raise RefusedError(
                "Enable postcopy with migrate_set_capability before the start of migration"
            )
        outgoing = self._outgoing
        if outgoing is None:
            raise RefusedError("Postcopy must be started after migration has been started")
        outgoing.postcopy_wanted.set()

    # --- incoming ----------------------------------------------------------------------

    def incoming(
        self,
        uri: str,
        *,
        fds: Descriptors | None = None,
        on_failure: Callable[[StillframeError], None] | None = None,
    ) -> None:
        """Wait for a migration at ``uri`` and load it. Works once in a machine's life.

        Args:
            on_failure: called with the error, in the load's thread, if the load fails.

        Raises:
            UsageError: the URI is malformed. RefusedError: the machine does not wait for a
                migration, or this was called before. HostError, BusyError, NotFoundError: the
                address cannot be listened on, or the file or descriptor not opened.
        """
        with self._board.lock, self._lock:
            if self._incoming is not None:
                raise RefusedError("The incoming migration has already been started")
            if self._board.run_state != "inmigrate":
                raise RefusedError("'-incoming' was not specified on the command line")
            incoming = Incoming(
                self._board,
                self._handler,
                self._capabilities.as_dict(),
                protection=self._protection,
                tell=self._tell,
                on_failure=on_failure,
            )
            try:
                arrival = expect(parse_uri(uri), fds or Descriptors(), incoming.interrupt)
            except BaseException:
                incoming.interrupt.close()
                raise
            self._incoming = incoming
        incoming.start(arrival)

    # --- both --------------------------------------------------------------------------

    def query(self) -> dict[str, object]:
        """Return the current status in QEMU's field names (``query-migrate``)."""
        return query.migration_info(self._outgoing, self._incoming, self._board.blocked_reasons())

    def wait(self, timeout_s: float | None = None) -> bool:
        """Wait until no migration is under way, incoming or outgoing.

        Returns:
            Whether they ended in time.

        Raises:
            StillframeError: why the incoming one, or else the last outgoing one, failed.
        """
        deadline_s = None if timeout_s is None else time.monotonic() + timeout_s
        for one in (self._incoming, self._outgoing):
            if one is None:
                continue
            left_s = None if deadline_s is None else max(0.0, deadline_s - time.monotonic())
            if not one.ended.wait(left_s):
                return False
            if one.error is not None:
                raise one.error
        return True

    def close(self) -> None:
        """Abort all migration and wait until it has ended, as the machine ends. Never raises."""
        self.give_up()
        for one in (self._incoming, self._outgoing):
            if one is not None:
                one.ended.wait(_END_S)

    def give_up(self) -> None:
        """Abort all migration without waiting: threads that wait for a page or for I/O go on soon.

        Source: QEMU ``migration/migration.c``: migration_shutdown.
        """
        for one in (self._incoming, self._outgoing):
            if one is not None:
                one.cancel()
                one.interrupt.set()  # even past the point of no return
