"""One incoming migration: waits for a stream, loads it, and lets the guest run if it ran.

Source: QEMU ``migration/migration.c``: process_incoming_migration_co,
process_incoming_migration_bh.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Mapping
from contextlib import ExitStack, suppress
from typing import TYPE_CHECKING

from stillframe.errors import (
    InternalError,
    SinkError,
    SnapshotCancelled,
    StillframeError,
)
from stillframe.machine.board.layout import DIMM_IDSTR
from stillframe.memory.guest_ram import GuestRam
from stillframe.memory.own_protection import Preference
from stillframe.migration.incoming_channel import Arrival, IncomingChannel
from stillframe.migration.incoming_commands import IncomingCommands
from stillframe.migration.incoming_postcopy import IncomingPostcopy
from stillframe.migration.interruptible import Interrupt
from stillframe.migration.ram_handler import RamHandler
from stillframe.migration.ram_loader import RamLoader
from stillframe.migration.states import StatusCell, Tell
from stillframe.vmstate.load_state import StateLoader
from stillframe.vmstate.source import StreamSource

if TYPE_CHECKING:
    from stillframe.machine.board.board import Board

_STOP_S = 0.2
"""How long vCPUs that do not wait for a page may take to stop."""


class Incoming:
    """The load of one machine. After a failure the machine is half loaded and never runs.

    Args:
        handler: the board's registered ``ram`` handler.
        tell: takes MIGRATION events.
        on_failure: told what made it fail, when everything else is over.

    Attributes:
        interrupt: for the channel; ends waiting for the source, and reading from it.
        error: what made it fail.
        ended: set when nothing more happens.
    """

    def __init__(
        self,
        board: Board,
        handler: RamHandler,
        capabilities: Mapping[str, bool],
        *,
        protection: Preference,
        tell: Tell,
        on_failure: Callable[[StillframeError], None] | None = None,
    ) -> None:
        self._board = board
        self._on_failure = on_failure
        self._handler = handler
        self.interrupt = Interrupt()
        self.status = StatusCell(lambda state: tell("MIGRATION", {"status": state}))
        self.error: StillframeError | None = None
        self.ended = threading.Event()
        self.arrival: Arrival | None = None
        self._ram = RamLoader(self._find_ram, lambda: [ram.idstr for ram in board.rams])
        self._postcopy = IncomingPostcopy(
            self._ram,
            capabilities,
            protection,
            load_rest=self._load_rest,
            start_guest=self._start_guest,
        )
        self._loader: StateLoader | None = None
        self._source: StreamSource | None = None

    def _find_ram(self, idstr: str, length_bytes: int) -> GuestRam | None:
        for ram in self._board.rams:
            if ram.idstr == idstr:
                return ram
        if idstr != DIMM_IDSTR:
            return None
        # RAM that was plugged in at the source while it ran.
        self._board.plug_dimm(length_bytes)
        return self._find_ram(idstr, length_bytes)

    def _load_rest(self) -> None:
        if self._loader is None or self._source is None:
            raise InternalError("postcopy began before the load")
        self._loader.load_sections(self._source)

    def _start_guest(self) -> None:
        with self._board.lock:
            self._board.finish_incoming()

    def start(self, arrival: Arrival) -> None:
        """Wait for the source, and load, in a thread of its own."""
        self.arrival = arrival
        self.status.change("setup", only_from=("none",))
        threading.Thread(
            target=self._run, args=(arrival,), name="stillframe-incoming", daemon=True
        ).start()

    @property
    def loading(self) -> bool:
        """Whether a source was accepted, and its stream is not at its end."""
        return self.status.value in ("active", "postcopy-active")

    def cancel(self) -> None:
        """Give it up: for the end of the machine. It ends as ``failed``."""
        self.interrupt.set()

    def _run(self, arrival: Arrival) -> None:
        failure: BaseException | None = None
        try:
            with ExitStack() as cleanup:
                cleanup.callback(arrival.close)
                channel = arrival.open()
                if channel is None:
                    raise SnapshotCancelled("the incoming migration was given up")
                cleanup.callback(channel.close)
                self._load(channel, cleanup)
        except BaseException as error:  # noqa: BLE001 - kept for whoever asks
            failure = error
        self.interrupt.close()
        self._handler.loader = None
        if failure is not None:
            self.error = (
                failure
                if isinstance(failure, StillframeError)
                else InternalError("load of migration failed", why=repr(failure))
            )
            self.status.change("failed", only_from=("setup", "active", "postcopy-active"))
        self.ended.set()
        if self.error is not None and self._on_failure is not None:
            self._on_failure(self.error)

    def _load(self, channel: IncomingChannel, cleanup: ExitStack) -> None:
        self.status.change("active", only_from=("setup",))
        commands = IncomingCommands(channel, self._postcopy)
        loader = commands.loader = StateLoader(
            self._board.registry, machine_type=self._board.machine_type, on_command=commands.handle
        )
        self._loader = loader
        self._source = StreamSource(channel, live=channel.can_reply)
        self._handler.loader = self._ram
        cleanup.callback(self._postcopy.close)
        cleanup.callback(self.interrupt.set)  # before that, so that nothing loads any more
        try:
            if loader.load(self._source):
                self.status.change("postcopy-active", only_from=("active",))
                self._postcopy.wait_for_rest()
            else:
                self._ram.check_complete()
                self._start_guest()
        except BaseException:
            # Told that it failed the source goes on, so not if the guest runs here.
            if commands.reply is not None and not self._runs_already():
                with suppress(SinkError):
                    commands.reply.shut(1)
            if self._postcopy.started:
                self._stop_lost_guest()
            raise
        self.status.change("completed", only_from=("active", "postcopy-active"))
        if commands.reply is not None:
            # A source that is gone by now can do nothing about it, and nor can we.
            with suppress(SinkError):
                commands.reply.shut(0)

    def _runs_already(self) -> bool:
        return not self._postcopy.started and self._board.run_state == "running"

    def _stop_lost_guest(self) -> None:
        """It runs already, and pages of it will never come."""
        # Who waits for such a page, a vCPU or a device's thread, cannot be stopped before it is let
        # go, and is to be stopped as soon as it is: so the stop is asked for first.
        stopper = threading.Thread(
            target=self._stop_and_give_up_disks, name="stillframe-lost-guest", daemon=True
        )
        stopper.start()
        stopper.join(_STOP_S)
        # Its block device may be among those that wait, for what it is to write.
        self._board.lose_disks()
        self.interrupt.set()
        self._postcopy.close()
        stopper.join()

    def _stop_and_give_up_disks(self) -> None:
        with suppress(StillframeError), self._board.lock:
            self._board.stop("internal-error")
            self._board.inactivate_disks()
