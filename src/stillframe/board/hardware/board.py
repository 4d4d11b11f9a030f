"""The board: what others use of it (docs/design/board.md)."""

from __future__ import annotations

import atexit
import logging
import threading
from collections.abc import Callable, Sequence

from stillframe.board.hardware.clock import Clock
from stillframe.board.hardware.config import BoardConfig
from stillframe.board.hardware.events import Events, Listener
from stillframe.board.hardware.framebuffer import Picture
from stillframe.board.hardware.guest_requests import GuestRequests
from stillframe.board.hardware.hardware import Hardware
from stillframe.board.hardware.life import Life
from stillframe.board.hardware.power import NOTHING
from stillframe.board.hardware.run_control import FOR_SAVING, LOADING, SENDING, RunControl
from stillframe.board.memory.guest_ram import GuestRam
from stillframe.board.state.global_state import GLOBAL_STATE, GlobalState
from stillframe.board.state.handlers import SaveStateRegistry
from stillframe.board.state.save_state import StateSaver
from stillframe.errors import MachineError, UsageError
from stillframe.model import GpaRange, RamBlock

logger = logging.getLogger(__name__)


class Board:
    """One machine. Methods may be called by any thread but the board's own, and not by listeners.

    ``lock``: the board lock; it guards run state and device registers. Methods that wait for the
    vCPUs let go of it meanwhile, however often the caller holds it. ``blockers``: reasons why the
    board must not be saved, for whoever adds and removes them.

    End every board with ``close``, or ``quit``.
    """

    machine_type = "stillframe-board-1"

    def __init__(self, config: BoardConfig) -> None:
        """Make it; nothing runs yet.

        Raises:
            HostError: no memory, or the disk or the serial line's place cannot be opened.
        """
        self.config = config
        self.name = config.name
        self.lock = threading.RLock()
        self._events = Events()
        self.blockers: list[str] = []
        self._torn_down = threading.Event()
        self._quit_began = False
        self._on_quit: list[Callable[[], None]] = []
        self._on_end: list[Callable[[], None]] = []
        self._starts_when_loaded = False
        self._threads_started = False
        clock = Clock()
        self._control = RunControl(self.lock, clock, self._events, may_run=self._may_run)
        self.hardware = Hardware(
            config,
            self.lock,
            clock,
            on_still=self._control.something_stopped,
            on_request=self._asked,
        )
        hardware = self.hardware
        self._control.control(hardware.vcpus, hardware.threads, hardware.serial, hardware.alarm)
        self._life = Life(config, hardware, self._control, self._events)
        self._requests = GuestRequests(
            self._control, hardware.power, hardware.vcpus, self._life.serve, self._tear_down
        )
        self.registry = SaveStateRegistry()
        self.global_state = GlobalState(lambda: self._control.state_to_store)
        self.registry.register_device("globalstate", GLOBAL_STATE, self.global_state)
        hardware.register(self.registry)
        self.saver = StateSaver(
            self.registry,
            machine_type=self.machine_type,
            inactivate_disks=self.inactivate_disks,
        )

    # What it is

    @property
    def run_state(self) -> str:
        """In QEMU's words: prelaunch, running, paused, inmigrate, shutdown, ..."""
        return self._control.state

    @property
    def exit_status(self) -> int | None:
        """Of a guest that has ended: its own, or 134 if it panicked, or 70 if the board failed."""
        return self._life.exit_status

    @property
    def rams(self) -> tuple[GuestRam, ...]:
        """The RAM blocks."""
        return self.hardware.space.rams

    def ram_blocks(self) -> list[RamBlock]:
        """The RAM blocks as records, in the order of the stream."""
        return [ram.block() for ram in self.rams]

    def memory_map(self) -> tuple[GpaRange, ...]:
        """Where the guest sees its RAM, ascending by guest-physical address."""
        return self.hardware.space.memory_map()

    def vcpu_thread_ids(self) -> list[int]:
        """The kernel's numbers of the vCPUs' threads, by index."""
        return [vcpu.thread_id for vcpu in self.hardware.vcpus]

    def picture(self) -> Picture:
        """What the framebuffer shows now; torn where the guest is drawing."""
        return self.hardware.framebuffer.picture()

    def add_listener(self, listener: Listener) -> None:
        """Tell ``listener`` of events from now on; see ``events.Listener`` for what it may do."""
        with self.lock:
            self._events.add(listener)

    def remove_listener(self, listener: Listener) -> None:
        """Stop telling it."""
        with self.lock:
            self._events.remove(listener)

    def blocked_reasons(self) -> list[str]:
        """Why the board cannot be saved now; empty if it can. Without the board lock, which may
        be held for as long as a snapshot's destination is stuck."""
        return list(self.blockers)

    # Starting

    def power_on(self, *, paused: bool = False) -> None:
        """Load the guest and let it run.

        Args:
            paused: stay in ``prelaunch`` until ``cont``.

        Raises:
            UsageError: it has no guest, or was started before.
            NotFoundError, HostError, DataError: the guest cannot be read, or is none.
        """
        with self.lock:
            self._check_new()
            if not self._life.read_guest():
                raise UsageError("the board has no guest to start")
            self._life.begin()
            self._start_threads()
            if not paused:
                self.cont()

    def start_incoming(self, *, paused: bool = False) -> None:
        """Be ready for a stream (``StateLoader``): run state ``inmigrate``, disks given up.

        When it is loaded comes ``finish_incoming``; until then ``stop`` and ``cont`` only say
        whether the guest shall run then.

        Args:
            paused: it shall not.

        Raises:
            UsageError: it was started before.
            NotFoundError, HostError, DataError: its guest, needed for a reset, cannot be read.
        """
        with self.lock:
            self._check_new()
            self._life.read_guest()
            self.hardware.block.inactivate()
            self._start_threads()
            self._starts_when_loaded = not paused
            self._control.stop(LOADING)

    def finish_incoming(self) -> None:
        """What was loaded is complete: go on in the run state that it stores.

        Source: QEMU ``migration/migration.c`` (process_incoming_migration_bh).

        Raises:
            HostError: a disk cannot be opened; the guest does not run.
            MachineError: it cannot run, or the board was quit.
        """
        with self.lock:
            stored = self.global_state.run_state
            if stored in ("running", ""):
                if self._starts_when_loaded:
                    self._control.cont(self.activate_disks)
                    self._requests.look()
                    return
                stored = "paused"
            elif stored in (LOADING, *FOR_SAVING):
                # Only for the sake of a migration, which is none of this board's.
                stored = "paused"
            self._control.stop(stored)

    def _check_new(self) -> None:
        if self._threads_started:
            raise UsageError(f"the board was started before, it is '{self.run_state}'")

    def _start_threads(self) -> None:
        self._threads_started = True
        # Unicorn frees its engines at the interpreter's end, also those that run.
        atexit.register(self.close)
        self._requests.start_thread()
        self.hardware.start_threads()

    # Running

    def stop(self, state: str | None = None) -> None:
        """Stop the guest: every vCPU is parked, no device's thread does anything, the clock stands
        still, and the disk's cache is in its file (which may not be on its medium yet).

        Args:
            state: the run state to enter, ``paused`` if it was running; a guest that does not run
                stays as it is without one, and does not go on by itself if a live migration fails
                that has stopped it.

        Raises:
            MachineError: the board was quit.
        """
        with self.lock:
            if state is None and self.run_state == LOADING:
                self._starts_when_loaded = False
            else:
                self._control.stop(state)

    def cont(self) -> None:
        """Let the guest run; disks that were given up are taken back.

        Raises:
            MachineError: it must be reset first, a live migration sends the last of its state, or
                the board was quit; it does not run.
            HostError: a disk cannot be opened; it does not run.
        """
        with self.lock:
            if self.run_state == LOADING:
                self._starts_when_loaded = True
                return
            self._control.cont(self.activate_disks)
            self._requests.look()

    def stop_to_save(self) -> None:
        """Stop a guest that runs (see ``stop``), in run state ``save-vm``; one that does not is
        left as it is. Until ``go_on_saved``, ``stop``, ``cont``, ``reset``, ``plug_dimm`` and the
        end of the board wait: nothing may change what is being saved.

        Raises:
            MachineError: the board was quit.
        """
        self._control.hold()

    def go_on_saved(self) -> None:
        """A guest that ``stop_to_save`` has stopped goes on; otherwise nothing happens."""
        with self.lock:
            self._control.let_go()
            self._requests.look()

    def return_from_sending(self) -> None:
        """A live migration has failed: out of run state ``finish-migrate`` into the one before it,
        ``paused`` if it was running and ``stop`` came meanwhile. The disks are taken back.

        Raises:
            HostError: a disk cannot be opened; the guest does not run.
            MachineError: the board was quit.
        """
        with self.lock:
            self._control.return_from_sending(self.activate_disks)
            self._requests.look()

    def reset(self) -> None:
        """Start the guest anew; RAM outside of it keeps what it has.

        One that does not run is in ``prelaunch`` afterwards, as in QEMU. Without a guest to start,
        as on a board that only took a stream, the board shuts down.

        Raises:
            MachineError: the board was quit; or its state is being loaded, or the last of it sent
                by a live migration (``inmigrate``, ``finish-migrate``): nothing was done.
        """
        with self._control.quiesced():
            self._refuse_while("reset", SENDING, LOADING)
            self._life.begin_again(guest_asked=False)

    def powerdown(self) -> None:
        """Press the power button; the guest may do about it what it likes."""
        with self.lock:
            self.hardware.power.press()
            self._events.tell("POWERDOWN")

    def plug_dimm(self, length_bytes: int) -> None:
        """Plug in more RAM (``board.dimm0``), also while the guest runs: its vCPUs are stopped for
        less than a millisecond.

        Raises:
            UsageError: there is a DIMM, or it cannot be so long.
            HostError: no memory.
            MachineError: the board was quit, or a live migration sends the last of its state.
        """
        with self._control.quiesced():
            self._refuse_while("given RAM", SENDING)
            # An incoming stream brings the guest's board information with it.
            self.hardware.plug_dimm(length_bytes, tell=self.run_state != LOADING)

    def _refuse_while(self, what: str, *states: str) -> None:
        if self.run_state in states:
            raise MachineError(
                f"the machine cannot be {what} in run state '{self.run_state}'",
                why="a migration is moving its RAM",
                remedy="wait for the migration to end",
                guest_state="paused",
            )

    def activate_disks(self) -> None:
        """Take the disks back, if they were given up.

        Raises:
            HostError: one cannot be opened.
        """
        with self.lock:
            self.hardware.block.activate()

    def inactivate_disks(self) -> None:
        """Write everything to the disks' media and give them up, for another machine to use.

        Raises:
            MachineError: the guest runs, or a disk cannot be written and is kept.
        """
        with self.lock:
            if self._control.running:
                raise MachineError("the guest uses its disks", guest_state="running")
            self.hardware.block.inactivate()

    def lose_disks(self) -> None:
        """Guest RAM is lost: nothing that is read of it from now on gets to a disk. Without the
        board lock; for good, but for a reset."""
        self.hardware.block.lose()

    def on_quit(self, callback: Callable[[], None]) -> None:
        """Call it first of all when the board is quit; it must let go whoever waits for a page of
        guest RAM, or else the vCPUs never stop. It must not wait."""
        self._on_quit.append(callback)

    def on_end(self, callback: Callable[[], None]) -> None:
        """Call it at the end, when nothing runs any more and RAM is still there. Without the
        board lock."""
        self._on_end.append(callback)

    def quit(self) -> None:
        """End the board, its threads and its memory; returns at once. Twice does nothing.

        ``wait`` or ``close`` waits for the end.
        """
        with self.lock:
            if self._quit_began:
                return
            self._quit_began = True
            _call(self._on_quit)
            self._events.tell("SHUTDOWN", guest=False, reason="host-qmp-quit")
            if self._threads_started:
                self._requests.quit()
                return
        self._tear_down()

    def close(self) -> None:
        """``quit``, and wait for the end. Without the board lock."""
        self.quit()
        self._requests.join()

    def _tear_down(self) -> None:
        with self.lock:
            self._control.end()
            self.hardware.end_threads()
        _call(self._on_end)
        self.hardware.close()
        atexit.unregister(self.close)
        self._torn_down.set()
        self._life.ended.set()

    def wait(self, timeout_s: float | None = None) -> bool:
        """Wait until the guest has powered off or panicked, or the board failed or was quit; of one
        that is being quit, until all of it has ended.

        Returns:
            Whether that is so; ``exit_status`` says more.
        """
        if self._quit_began:
            return self._torn_down.wait(timeout_s)
        return self._life.ended.wait(timeout_s)

    # What the guest asks for

    def _may_run(self) -> bool:
        return self.hardware.power.request == NOTHING

    def _asked(self) -> None:
        self._requests.asked()


def _call(callbacks: Sequence[Callable[[], None]]) -> None:
    for callback in callbacks:
        try:
            callback()
        except Exception:  # the board ends all the same
            logger.exception("what was to be done at the board's end has failed")
