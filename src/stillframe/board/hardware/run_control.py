"""The run state, and control of everything that runs: stop, resume, end.

Source: QEMU ``softmmu/runstate.c``, ``softmmu/cpus.c`` (vm_stop, do_vm_stop, vm_prepare_start,
pause_all_vcpus).
"""

from __future__ import annotations

import contextlib
import sys
import threading
from collections.abc import Callable, Iterator, Sequence

from stillframe.board.hardware.alarm import Alarm
from stillframe.board.hardware.clock import Clock
from stillframe.board.hardware.device_thread import DeviceThread
from stillframe.board.hardware.events import Events
from stillframe.board.hardware.serial_port import SerialPort
from stillframe.board.hardware.vcpu import Vcpu
from stillframe.errors import MachineError

SAVING = "save-vm"
"""The run state from ``hold`` to ``let_go``."""
SENDING = "finish-migrate"
"""The run state while a live migration sends the last of the machine, which must not change."""
LOADING = "inmigrate"
"""The run state while a stream is loaded."""
_NEEDS_RESET = ("shutdown", "internal-error", "guest-panicked")
_QUICK_SWITCH_S = 50e-6
FOR_SAVING = (SENDING, "postmigrate", SAVING)
"""States that exist only for saving; a stream stores the state before them."""


class RunControl:
    """The run state and its transitions. Guarded by the board lock, which methods release while
    they wait, however often the caller holds it (as QEMU's big lock while it pauses vCPUs)."""

    def __init__(
        self,
        lock: threading.RLock,
        clock: Clock,
        events: Events,
        *,
        may_run: Callable[[], bool],
    ) -> None:
        """
        Args:
            may_run: returns False while a guest request must be served first.
        """
        self.lock = lock
        self.state = "prelaunch"
        self._state_before_saving = "prelaunch"
        self._state_before_sending = "prelaunch"
        self._clock = clock
        self._events = events
        self._may_run = may_run
        self._vcpus: Sequence[Vcpu] = ()
        self._threads: Sequence[DeviceThread] = ()
        self._serial: SerialPort | None = None
        self._alarm: Alarm | None = None
        self._still = threading.Condition(lock)
        self._transition_ended = threading.Condition(lock)
        self._in_transition = False
        self._held = False
        self._quit = False

    def control(
        self,
        vcpus: Sequence[Vcpu],
        threads: Sequence[DeviceThread],
        serial: SerialPort,
        alarm: Alarm,
    ) -> None:
        """Set what ``self`` stops and resumes."""
        self._vcpus = vcpus
        self._threads = threads
        self._serial = serial
        self._alarm = alarm

    def something_stopped(self) -> None:
        """Note that a vCPU has parked or a device thread has become quiet."""
        if self._is_still():
            self._still.notify_all()

    @property
    def running(self) -> bool:
        return self.state == "running"

    @property
    def state_to_store(self) -> str:
        """The run state that a stream made now stores."""
        return self._state_before_saving if self.state in FOR_SAVING else self.state

    def stop(self, state: str | None) -> None:
        with self._transition():
            if self.running:
                self._stop_running(state or "paused")
            elif state is not None:
                self._enter(state)
            elif self.state == SENDING and self._state_before_sending == "running":
                # The guest must not resume by itself: neither here if the migration fails, nor
                # at the target.
                self._state_before_sending = self._state_before_saving = "paused"

    def hold(self) -> None:
        """Stop a running guest to save it; until ``let_go``, every other transition waits. Leave
        any other guest as it is, and free for other callers."""
        with self.lock:
            self._begin_transition()
            try:
                if self.running:
                    self._stop_running(SAVING)
                    self._held = True
            finally:
                if not self._held:
                    self._end_transition()

    def let_go(self) -> None:
        """Resume a guest that ``hold`` stopped; otherwise do nothing."""
        with self.lock:
            if not self._held:
                return
            self._held = False
            try:
                self._run_again()
            finally:
                self._end_transition()

    def return_from_sending(self, activate_disks: Callable[[], None]) -> None:
        """Leave ``finish-migrate`` for the state before it; paused if ``stop`` came meanwhile."""
        with self._transition():
            if self._state_before_sending == "running":
                # Without its disks the guest stays paused; ``cont`` may be tried again.
                self._enter("paused")
                activate_disks()
                self._run_again()
            else:
                self._enter(self._state_before_sending)
                activate_disks()

    def cont(self, activate_disks: Callable[[], None]) -> None:
        with self._transition():
            if self.running:
                return
            if self.state == SENDING:
                raise MachineError("Migration is not finalized yet", guest_state="paused")
            if self.state in _NEEDS_RESET:
                raise MachineError(
                    f"the machine cannot go on from run state '{self.state}'",
                    remedy="reset it",
                    guest_state="paused",
                )
            activate_disks()
            self._run_again()

    @contextlib.contextmanager
    def quiesced(self) -> Iterator[None]:
        """Keep everything stopped in the context, with the board lock held; keep the run state."""
        with self._transition():
            if self.running:
                self._halt()
            try:
                yield
            finally:
                if self.running:
                    self._go_on()

    def set_state(self, state: str) -> None:
        """Change the run state, within ``quiesced``."""
        self._enter(state)

    def end(self) -> None:
        """Stop everything for good."""
        with self._transition():
            self._halt()
            self._quit = True
            self._enter("shutdown")

    @contextlib.contextmanager
    def _transition(self) -> Iterator[None]:
        with self.lock:
            self._begin_transition()
            try:
                yield
            finally:
                self._end_transition()

    def _begin_transition(self) -> None:
        # A halt releases the lock; no other thread may begin a transition meanwhile.
        while self._in_transition:
            self._transition_ended.wait()
        if self._quit:
            raise MachineError("the machine was quit", guest_state="none")
        self._in_transition = True

    def _end_transition(self) -> None:
        self._in_transition = False
        self._transition_ended.notify_all()

    def _enter(self, state: str) -> None:
        if state in FOR_SAVING and self.state not in FOR_SAVING:
            self._state_before_saving = self.state
        if state == SENDING:
            self._state_before_sending = self.state
        self.state = state

    def _stop_running(self, state: str) -> None:
        self._halt()
        self._enter(state)
        self._events.tell("STOP")

    def _run_again(self) -> None:
        self._enter("running")
        self._go_on()
        self._events.tell("RESUME")

    def _halt(self) -> None:
        self._clock.stop()
        if self._serial is not None:
            self._serial.pause()
        for vcpu in self._vcpus:
            vcpu.park()
        for thread in self._threads:
            thread.pause()
        with quick_switching():
            while not self._is_still():
                self._still.wait()

    def _is_still(self) -> bool:
        return all(vcpu.parked for vcpu in self._vcpus) and all(
            thread.quiet for thread in self._threads
        )

    def _go_on(self) -> None:
        if not self._may_run():
            return
        self._clock.start()
        if self._serial is not None:
            self._serial.resume()
        for thread in self._threads:
            thread.resume()
        for vcpu in self._vcpus:
            vcpu.resume()
        if self._alarm is not None:
            self._alarm.look()


_switching_lock = threading.Lock()
_switching: list[float] = []
"""The usual interval, once for each thread inside ``quick_switching``."""


@contextlib.contextmanager
def quick_switching() -> Iterator[None]:
    """Hand over the GIL quickly while a thread waits for vCPUs; several threads may be inside.

    A vCPU needs the GIL to park. By default a thread that computes in Python keeps it for up to
    5 ms (``sys.setswitchinterval``), several times the downtime.
    """
    with _switching_lock:
        usual_s = _switching[0] if _switching else sys.getswitchinterval()
        _switching.append(usual_s)
        sys.setswitchinterval(min(_QUICK_SWITCH_S, usual_s))
    try:
        yield
    finally:
        with _switching_lock:
            _switching.pop()
            if not _switching:
                sys.setswitchinterval(usual_s)
