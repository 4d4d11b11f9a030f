"""One incoming migration: waits for a stream, loads it, and resumes the guest if it was running.

Source: QEMU ``migration/migration.c``: process_incoming_migration_co,
process_incoming_migration_bh.
"""

from __future__ import annotations

import io
import threading
from collections.abc import Callable, Mapping
from contextlib import ExitStack, suppress
from typing import TYPE_CHECKING

from stillframe.board.hardware.layout import DIMM_IDSTR
from stillframe.board.memory.guest_ram import GuestRam
from stillframe.board.memory.own_protection import Preference
from stillframe.board.migration.incoming_channel import Arrival, IncomingChannel
from stillframe.board.migration.incoming_postcopy import IncomingPostcopy
from stillframe.board.migration.interruptible import Interrupt
from stillframe.board.migration.outgoing import Tell
from stillframe.board.migration.ram_handler import RamHandler
from stillframe.board.migration.ram_loader import RamLoader
from stillframe.board.migration.return_path import ReturnPathWriter
from stillframe.board.migration.stream_commands import MOST_PACKAGED_BYTES, read_number
from stillframe.board.state.load_state import StateLoader
from stillframe.errors import (
    DataError,
    InternalError,
    SinkError,
    SnapshotCancelled,
    StillframeError,
)
from stillframe.snapshot.job_state import StateMachine
from stillframe.vmstate.source import StreamSource
from stillframe.vmstate.wire import CommandCode

if TYPE_CHECKING:
    from stillframe.board.hardware.board import Board

_STOP_S = 0.2
"""Time for vCPUs to stop, unless they wait for a page."""


class Incoming:
    """The load of one machine from a stream. After a failure the machine must not run.

    Args:
        handler: the board's registered ``ram`` handler.
        tell: takes MIGRATION events.
        on_failure: called with the error as the last step of a failed load.

    Attributes:
        interrupt: the channel's; ends waiting for the source and reading from it.
        error: why the load failed.
        ended: set when the load is over.
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
        self.states = StateMachine(lambda state: tell("MIGRATION", {"status": state}))
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
        # RAM that was hot-plugged at the source.
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
        """Start a thread that waits for the source and loads its stream."""
        self.arrival = arrival
        self.states.enter("setup")
        threading.Thread(
            target=self._run, args=(arrival,), name="stillframe-incoming", daemon=True
        ).start()

    @property
    def loading(self) -> bool:
        """Whether a source was accepted and its stream has not ended."""
        return self.states.value in ("active", "postcopy-active")

    def cancel(self) -> None:
        """Give up the load because the machine ends; the state becomes ``failed``."""
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
        except BaseException as error:  # noqa: BLE001 - kept in ``error``
            failure = error
        self.interrupt.close()
        self._handler.loader = None
        if failure is not None:
            self.error = (
                failure
                if isinstance(failure, StillframeError)
                else InternalError("load of migration failed", why=repr(failure))
            )
            self.states.end(failed=True)
        self.ended.set()
        if self.error is not None and self._on_failure is not None:
            self._on_failure(self.error)

    def _load(self, channel: IncomingChannel, cleanup: ExitStack) -> None:
        self.states.enter("active")
        commands = IncomingCommands(channel, self._postcopy)
        loader = commands.loader = StateLoader(
            self._board.registry, machine_type=self._board.machine_type, on_command=commands.handle
        )
        self._loader = loader
        self._source = StreamSource(channel, live=channel.can_reply)
        self._handler.loader = self._ram
        cleanup.callback(self._postcopy.close)
        cleanup.callback(self.interrupt.set)  # runs first, so that the load stops
        try:
            if loader.load(self._source):
                self.states.enter("postcopy-active")
                self._postcopy.wait_for_rest()
            else:
                self._ram.check_complete()
                self._start_guest()
        except BaseException:
            # SHUT(1) makes the source resume the guest, so never send it while the guest runs here.
            if commands.reply is not None and not self._runs_already():
                with suppress(SinkError):
                    commands.reply.shut(1)
            if self._postcopy.started:
                self._stop_lost_guest()
            raise
        self.states.end(failed=False)
        if commands.reply is not None:
            # The guest runs: a source that is gone by now makes no difference.
            with suppress(SinkError):
                commands.reply.shut(0)

    def _runs_already(self) -> bool:
        return not self._postcopy.started and self._board.run_state == "running"

    def _stop_lost_guest(self) -> None:
        """Stop a guest that already runs but will never get all of its pages."""
        # A vCPU or device thread that waits for such a page cannot stop before it is released, and
        # must not run on afterwards: so request the stop first, then release.
        stopper = threading.Thread(
            target=self._stop_and_give_up_disks, name="stillframe-lost-guest", daemon=True
        )
        stopper.start()
        stopper.join(_STOP_S)
        # The block device may be waiting for a page that it is about to write.
        self._board.lose_disks()
        self.interrupt.set()
        self._postcopy.close()
        stopper.join()

    def _stop_and_give_up_disks(self) -> None:
        with suppress(StillframeError), self._board.lock:
            self._board.stop("internal-error")
            self._board.inactivate_disks()


class IncomingCommands:
    """The handler of one stream's COMMAND records (QEMU ``migration/savevm.c``:
    loadvm_process_command).

    Attributes:
        reply: the return path, once the source has opened it.
        loader: loads packaged streams; must be set before the first command.
    """

    def __init__(self, channel: IncomingChannel, postcopy: IncomingPostcopy) -> None:
        self._channel = channel
        self._postcopy = postcopy
        self.reply: ReturnPathWriter | None = None
        self.loader: StateLoader | None = None

    def handle(self, code: int, data: bytes, source: StreamSource) -> bool:
        """Handle one command; return True if the loop that read it must stop reading.

        Raises:
            DataError: the command is unknown, malformed, or out of order.
            SinkError: the source is gone.
        """
        match code:
            case CommandCode.OPEN_RETURN_PATH:
                # A channel without replies holds a stored stream: no source waits for an answer.
                if self._channel.can_reply:
                    self.reply = self.reply or ReturnPathWriter(self._channel.reply)
            case CommandCode.PING:
                number = read_number(data, "PING")
                if self._channel.can_reply:
                    self._reply_or_refuse(f"CMD_PING ({number:#x})").pong(number)
            case CommandCode.POSTCOPY_ADVISE:
                self._postcopy.advise(data)
            case CommandCode.POSTCOPY_RAM_DISCARD:
                self._postcopy.discard(data)
            case CommandCode.PACKAGED:
                return self._load_package(read_number(data, "PACKAGED"), source)
            case CommandCode.POSTCOPY_LISTEN:
                self._postcopy.listen(self._reply_or_refuse("CMD_POSTCOPY_LISTEN"))
            case CommandCode.POSTCOPY_RUN:
                self._postcopy.run()
                return True
            case CommandCode.SWITCHOVER_START:
                pass  # only announces the device states
            case _:
                raise DataError(f"command {code} is not for this machine")
        return False

    def _reply_or_refuse(self, what: str) -> ReturnPathWriter:
        if self.reply is None:
            raise DataError(f"{what} received with no return path")
        return self.reply

    def _load_package(self, length_bytes: int, source: StreamSource) -> bool:
        if length_bytes > MOST_PACKAGED_BYTES:
            raise DataError(f"Unreasonably large packaged state: {length_bytes}")
        if self.loader is None:
            raise DataError("a packaged stream within a packaged stream")
        content = source.take(length_bytes, "a packaged stream")
        loader, self.loader = self.loader, None
        return loader.load_sections(StreamSource(io.BytesIO(content)))
