"""One outgoing migration: what its steps share, its thread, and its end."""

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
"""Takes an event's name and data; it must be quick and not call back."""

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
        """A background snapshot has come so far."""
        self.counters.follow(statistics)
        # QEMU does not limit it; a limit that somebody chose is another matter.
        if self.parameters.chosen("max-bandwidth"):
            self.control.limit.bytes_per_s = self.parameters.now.max_bandwidth or None

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
                cleanup.callback(channel.abort)
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
            # Before the state: who sees ``failed`` may ask why.
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
        """Give up, unless it is past the point of no return; from any thread.

        Returns:
            Whether it is going to end as ``cancelled``.
        """
        if not self.control.cancel():
            return False
        self.interrupt.set()
        return True
