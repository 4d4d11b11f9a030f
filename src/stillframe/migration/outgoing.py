"""One outgoing migration: what its steps share, its thread, and its end."""

from __future__ import annotations

import threading
from collections.abc import Callable, Mapping
from contextlib import ExitStack
from typing import TYPE_CHECKING

from stillframe.errors import InternalError, SnapshotCancelled, StillframeError
from stillframe.memory.own_protection import Preference
from stillframe.migration.capabilities import BACKGROUND_SNAPSHOT
from stillframe.migration.counters import Counters
from stillframe.migration.interruptible import Interrupt
from stillframe.migration.outgoing_channel import Departure, OutgoingChannel
from stillframe.migration.parameters import ParameterTable
from stillframe.migration.ram_handler import RamHandler
from stillframe.migration.states import MigrationStatus, StatusCell, Tell
from stillframe.model import JobState
from stillframe.snapshot.job import JobControl

if TYPE_CHECKING:
    from stillframe.machine.board.board import Board

_JOB_STATES: Mapping[MigrationStatus, JobState] = {
    "completed": "completed",
    "failed": "failed",
    "cancelled": "cancelled",
}

Transfer = Callable[["Outgoing", OutgoingChannel, ExitStack], None]


class Outgoing:
    """A migration to somewhere else, or a background snapshot of the board.

    Args:
        handler: the board's registered ``ram`` handler.
        capabilities: as they are at the start; they cannot change while it runs.
        parameters: these may change, and are followed.
        tell: takes MIGRATION and MIGRATION_PASS events.
    """

    def __init__(
        self,
        board: Board,
        handler: RamHandler,
        capabilities: Mapping[str, bool],
        parameters: ParameterTable,
        *,
        protection: Preference,
        tell: Tell,
    ) -> None:
        self.board = board
        self.handler = handler
        self.capabilities = dict(capabilities)
        self.parameters = parameters
        self.protection: Preference = protection
        self.tell = tell
        self.counters = Counters()
        self.counters.ram_bytes = sum(ram.length_bytes for ram in board.rams)
        self.counters.expected_downtime_ms = parameters.now.downtime_limit
        self.control = JobControl(None)
        self.control.progress.ram_bytes = self.counters.ram_bytes
        self.interrupt = Interrupt()
        self.postcopy_wanted = threading.Event()
        self.status = StatusCell(lambda state: tell("MIGRATION", {"status": state}))
        self.status.change("setup", only_from=("none",))
        self.error: StillframeError | None = None
        self.ended = threading.Event()

    @property
    def background(self) -> bool:
        return self.capabilities[BACKGROUND_SNAPSHOT]

    def start(self, departure: Departure, transfer: Transfer) -> None:
        """Begin, in a thread of its own."""
        threading.Thread(
            target=self._run, args=(departure, transfer), name="stillframe-migration", daemon=True
        ).start()

    def fail_early(self, error: BaseException) -> None:
        """It ended before its thread began."""
        self._end(error)

    def _run(self, departure: Departure, transfer: Transfer) -> None:
        failure: BaseException | None = None
        try:
            with ExitStack() as cleanup:
                cleanup.callback(departure.close)
                cleanup.callback(self.board.saver.cleanup)
                channel = departure.open()
                cleanup.callback(channel.close)
                transfer(self, channel, cleanup)
        except BaseException as error:  # noqa: BLE001 - kept for whoever asks
            failure = error
        self._end(failure)

    def _end(self, failure: BaseException | None) -> None:
        """The last change of state: everything is cleaned up, the guest is where it belongs."""
        try:
            self.interrupt.close()
            if self.counters.ended_s is None:
                self.counters.end()
            error = None if failure is None else self._told(failure)
            # Before the state: who sees ``failed`` may ask why.
            self.error = error
            status = self.status.end(failed=error is not None)
            if status == "cancelled":
                self.error = None
            self.control.progress.begin(_JOB_STATES[status], status)
        finally:
            self.ended.set()

    def _told(self, failure: BaseException) -> StillframeError:
        error = (
            failure
            if isinstance(failure, StillframeError)
            else InternalError("the migration failed", why=repr(failure))
        )
        error.guest_state = "running" if self.board.run_state == "running" else "paused"
        return error

    def cancel(self) -> bool:
        """Give up, unless it is past the point of no return; from any thread.

        Returns:
            Whether it is going to end as ``cancelled``.
        """
        if not self.status.change("cancelling", only_from=("setup", "active", "device")):
            return self.status.value in ("cancelling", "cancelled")
        self.control.cancelled.set()
        self.interrupt.set()
        return True

    def enter(self, state: MigrationStatus, *, only_from: tuple[MigrationStatus, ...]) -> None:
        """Change the state.

        Raises:
            SnapshotCancelled: the migration was cancelled meanwhile.
        """
        if not self.status.change(state, only_from=only_from):
            raise SnapshotCancelled("the migration was cancelled", guest_state="running")

    def commit(self) -> None:
        """From here on the destination may run the guest, and no ``cancel`` can succeed.

        Raises:
            SnapshotCancelled: it was cancelled before.
        """
        if not self.status.make_final():
            raise SnapshotCancelled("the migration was cancelled", guest_state="running")
