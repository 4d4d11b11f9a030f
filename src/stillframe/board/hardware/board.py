"""The board's interface for the rest of Stillframe (docs/design/board.md)."""

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
    """One machine. Any thread but the board's own may call its methods; listeners may not.

    ``lock``: the board lock, which guards run state and device registers. Methods that wait for
    the vCPUs release it meanwhile, however often the caller holds it. ``blockers``: reasons why the
    board must not be saved; other parts of Stillframe add and remove them.

    End every board with ``close``, or ``quit``.
    """

    machine_type = "stillframe-board-1"

    def __init__(self, config: BoardConfig) -> None:
        """Make the board; nothing runs yet.

        Raises:
            HostError: no memory, or the disk or the serial line cannot be opened.
            UsageError, BusyError: the serial line's path is bad, or another program listens there.
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

    # State

    @property
    def run_state(self) -> str:
        """In QEMU's terms: prelaunch, running, paused, inmigrate, shutdown, ..."""
        return self._control.state

    @property
    def exit_status(self) -> int | None:
        """An ended guest's own; 134 if it panicked, 70 if the board failed; None before the end."""
        return self._life.exit_status

    @property
    def rams(self) -> tuple[GuestRam, ...]:
        """The RAM blocks."""
        return self.hardware.space.rams

    def ram_blocks(self) -> list[RamBlock]:
        """Return the RAM blocks as records, in stream order."""
        return [ram.block() for ram in self.rams]

    def memory_map(self) -> tuple[GpaRange, ...]:
        """Return where the guest sees its RAM, ascending by guest-physical address."""
        return self.hardware.space.memory_map()

    def vcpu_thread_ids(self) -> list[int]:
        """Return the kernel thread ids of the vCPUs, by index."""
        return [vcpu.thread_id for vcpu in self.hardware.vcpus]

    def picture(self) -> Picture:
        """Return what the framebuffer shows now; torn where the guest is drawing."""
        return self.hardware.framebuffer.picture()

    def add_listener(self, listener: Listener) -> None:
        """Tell ``listener`` of events from now on; see ``events.Listener`` for what it may do."""
        with self.lock:
            self._events.add(listener)

    def remove_listener(self, listener: Listener) -> None:
        """Stop telling ``listener`` of events."""
        with self.lock:
            self._events.remove(listener)

    def blocked_reasons(self) -> list[str]:
        """Return why the board cannot be saved now; empty if it can. Takes no board lock, which
        may be held for as long as a snapshot's destination is stuck."""
        return list(self.blockers)

    # Starting

    def power_on(self, *, paused: bool = False) -> None:
        """Load the guest and run it.

        Args:
            paused: stay in ``prelaunch`` until ``cont``.

        Raises:
            UsageError: the board has no guest or was started before, or the guest is a directory.
            NotFoundError, HostError, DataError: the guest cannot be read, or is not a guest.
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
        """Get ready for a stream (``StateLoader``): run state ``inmigrate``, disks given up.

        ``finish_incoming`` follows once it is loaded; until then ``stop`` and ``cont`` only decide
        whether the guest runs afterwards.

        Args:
            paused: the guest does not run afterwards.

        Raises:
            UsageError: the board was started before, or the guest is a directory.
            NotFoundError, HostError, DataError: the guest, needed for a reset, cannot be read.
        """
        with self.lock:
            self._check_new()
            self._life.read_guest()
            self.hardware.block.inactivate()
            self._start_threads()
            self._starts_when_loaded = not paused
            self._control.stop(LOADING)

    def finish_incoming(self) -> None:
        """Complete the load: enter the run state that the stream stored.

        Source: QEMU ``migration/migration.c`` (process_incoming_migration_bh).

        Raises:
            HostError: a disk cannot be opened; the guest does not run.
            MachineError: the guest cannot run, or the board was quit.
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
                # These states served the source's migration, not this board.
                stored = "paused"
            self._control.stop(stored)

    def _check_new(self) -> None:
        if self._threads_started:
            raise UsageError(f"the board was started before, it is '{self.run_state}'")

    def _start_threads(self) -> None:
        self._threads_started = True
        # Unicorn frees its engines when the interpreter exits, even running ones.
        atexit.register(self.close)
        self._requests.start_thread()
        self.hardware.start_threads()

    # Running

    def stop(self, state: str | None = None) -> None:
        """Stop the guest: park every vCPU, quiet every device thread, stop the clock, and write the
        disk's cache to its file (which may not be on its medium yet).

        Args:
            state: the run state to enter; by default, ``paused`` for a running guest. Any other
                guest then keeps its state, and does not resume by itself if the live migration
                that stopped it fails.

        Raises:
            MachineError: the board was quit.
        """
        with self.lock:
            if state is None and self.run_state == LOADING:
                self._starts_when_loaded = False
            else:
                self._control.stop(state)

    def cont(self) -> None:
        """Run the guest, and take back disks that were given up.

        Raises:
            MachineError: the guest must be reset first, a live migration is sending the last of
                its state, or the board was quit; the guest does not run.
            HostError: a disk cannot be opened; the guest does not run.
        """
        with self.lock:
            if self.run_state == LOADING:
                self._starts_when_loaded = True
                return
            self._control.cont(self.activate_disks)
            self._requests.look()

    def stop_to_save(self) -> None:
        """Stop a running guest (see ``stop``), in run state ``save-vm``; leave any other as it is.

        If the guest was running, ``stop``, ``cont``, ``reset``, ``plug_dimm`` and the end of the
        board wait until ``go_on_saved``: nothing may change what is being saved.

        Raises:
            MachineError: the board was quit.
        """
        self._control.hold()

    def go_on_saved(self) -> None:
        """Resume a guest that ``stop_to_save`` stopped; otherwise do nothing."""
        with self.lock:
            self._control.let_go()
            self._requests.look()

    def return_from_sending(self) -> None:
        """After a failed live migration, return from run state ``finish-migrate`` to the one before
        it, or to ``paused`` if ``stop`` came to a running guest meanwhile. Take the disks back.

        Raises:
            HostError: a disk cannot be opened; the guest does not run.
            MachineError: the board was quit.
        """
        with self.lock:
            self._control.return_from_sending(self.activate_disks)
            self._requests.look()

    def reset(self) -> None:
        """Restart the guest; RAM that it is not placed in keeps its contents.

        A guest that is not running is in ``prelaunch`` afterwards, as in QEMU. A board without a
        guest to start, such as one that only took a stream, shuts down.

        Raises:
            MachineError: the board was quit; or a migration is loading its state or sending the
                last of it (``inmigrate``, ``finish-migrate``). Nothing was done.
            HostError: no memory for this thread's signal stack. Nothing was done.
        """
        with self._control.quiesced():
            self._refuse_while("reset", SENDING, LOADING)
            self._life.begin_again(guest_asked=False)

    def powerdown(self) -> None:
        """Press the power button; the guest decides what it does."""
        with self.lock:
            self.hardware.power.press()
            self._events.tell("POWERDOWN")

    def plug_dimm(self, length_bytes: int) -> None:
        """Plug in more RAM (``board.dimm0``), even while the guest runs: this stops its vCPUs for
        less than a millisecond.

        Raises:
            UsageError: there is a DIMM already, or a DIMM cannot have this length.
            HostError: no memory.
            MachineError: the board was quit, or a live migration is sending the last of its state.
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
        """Write everything to the disks' media and give the disks up for another machine to use.

        Raises:
            MachineError: the guest runs, or a disk cannot be written and is kept.
        """
        with self.lock:
            if self._control.running:
                raise MachineError("the guest uses its disks", guest_state="running")
            self.hardware.block.inactivate()

    def lose_disks(self) -> None:
        """Keep lost guest RAM off the disks: write nothing read from it from now on, until a reset.
        Takes no board lock."""
        self.hardware.block.lose()

    def on_quit(self, callback: Callable[[], None]) -> None:
        """Call ``callback`` first when the board is quit. It must release every thread that waits
        for a page of guest RAM, or the vCPUs never stop. It must not wait."""
        self._on_quit.append(callback)

    def on_end(self, callback: Callable[[], None]) -> None:
        """Call ``callback`` at the end, when nothing runs any more and RAM is still there, without
        the board lock."""
        self._on_end.append(callback)

    def quit(self) -> None:
        """End the board, its threads and its memory. A second call does nothing.

        On a started board it returns at once; ``wait`` or ``close`` waits for the end.
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
        """``quit``, and wait for the end. The caller must not hold the board lock."""
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
        """Wait until the guest has powered off or panicked, or the board has failed or been quit;
        once ``quit`` was called, until everything has ended.

        Returns:
            Whether that came in time; ``exit_status`` says more.
        """
        if self._quit_began:
            return self._torn_down.wait(timeout_s)
        return self._life.ended.wait(timeout_s)

    # Guest requests

    def _may_run(self) -> bool:
        return self.hardware.power.request == NOTHING

    def _asked(self) -> None:
        self._requests.asked()


def _call(callbacks: Sequence[Callable[[], None]]) -> None:
    for callback in callbacks:
        try:
            callback()
        except Exception:  # the board must end anyway
            logger.exception("what was to be done at the board's end has failed")
