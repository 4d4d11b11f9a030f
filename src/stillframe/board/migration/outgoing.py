"""One outgoing migration: its shared state, its thread and its end."""

from __future__ import annotations

import threading
from collections.abc import Callable, Mapping
from contextlib import ExitStack
from typing import TYPE_CHECKING

from stillframe.board.memory.own_protection import Preference
from stillframe.board.migration.capabilities import BACKGROUND_SNAPSHOT
from stillframe.board.migration.counters import Counters
from stillframe.board.migration.interruptible import Interrupt
from stillframe.board.migration.outgoing_channel import Departure, OutgoingChannel
from stillframe.board.migration.parameters import ParameterTable
from stillframe.board.migration.ram_handler import RamHandler
from stillframe.errors import InternalError, StillframeError
from stillframe.model import JobState, Statistics
from stillframe.snapshot.job import JobControl

if TYPE_CHECKING:
    from stillframe.board.hardware.board import Board

Tell = Callable[[str, dict[str, object]], None]
"""Takes an event's name and data; must be quick and must not call back."""

Transfer = Callable[["Outgoing", OutgoingChannel, ExitStack], None]


class Outgoing:
    """A migration to a destination, or a background snapshot of the board.

    Args:
        handler: the board's registered ``ram`` handler.
        capabilities: copied at the start; they cannot change while the migration runs.
        parameters: may change while the migration runs, which follows them.
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
        self.interrupt = Interrupt()
        self.postcopy_wanted = threading.Event()
        self.error: StillframeError | None = None
        self.control = JobControl(self._follow if self.background else None, on_state=self._entered)
        self.control.progress.ram_bytes = self.counters.ram_bytes
        self.control.enter("setup", "setup")
        self.ended = threading.Event()

    @property
    def background(self) -> bool:
        return self.capabilities[BACKGROUND_SNAPSHOT]

    def _entered(self, state: JobState) -> None:
        if state == "active":
            self.counters.begin_transfer()
        self.tell("MIGRATION", {"status": state})

    def _follow(self, statistics: Statistics) -> None:
        """Take over a background snapshot's progress."""
        self.counters.follow(statistics)
        # QEMU does not limit a background snapshot; here an explicitly set limit holds.
        if self.parameters.chosen("max-bandwidth"):
            self.control.limit.bytes_per_s = self.parameters.now.max_bandwidth or None

    def start(self, departure: Departure, transfer: Transfer) -> None:
        """Start the migration's thread."""
        threading.Thread(
            target=self._run, args=(departure, transfer), name="stillframe-migration", daemon=True
        ).start()

    def fail_early(self, error: BaseException) -> None:
        """End the migration before its thread has started."""
        self._end(error)

    def _run(self, departure: Departure, transfer: Transfer) -> None:
        failure: BaseException | None = None
        try:
            with ExitStack() as cleanup:
                cleanup.callback(departure.close)
                cleanup.callback(self.board.saver.cleanup)
                channel = departure.open()
                cleanup.callback(channel.abort)
                transfer(self, channel, cleanup)
        except BaseException as error:  # noqa: BLE001 - kept in ``error``
            failure = error
        self._end(failure)

    def _end(self, failure: BaseException | None) -> None:
        """Enter the final state, after cleanup, with the guest in the run state it ends up in."""
        try:
            self.interrupt.close()
            if self.counters.ended_s is None:
                self.counters.end()
            # Set before the state: a caller that sees ``failed`` may ask why.
            self.error = None if failure is None else self._told(failure)
            if self.control.end(failed=failure is not None) == "cancelled":
                self.error = None
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
        """Cancel the migration unless it is past the point of no return. Any thread may call it.

        Returns:
            Whether the migration will end as ``cancelled``.
        """
        if not self.control.cancel():
            return False
        self.interrupt.set()
        return True
