"""One vCPU: its thread, and the loop that runs the guest, delivers interrupts, halts and parks.

The thread makes all decisions with the board lock held, and runs the guest without it.
"""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Callable, Iterator

from unicorn.unicorn_py3 import UcError

from stillframe.board.hardware.address_space import AddressSpace
from stillframe.board.hardware.board_thread import BoardThread
from stillframe.board.hardware.delivery import (
    EXCEPTIONS,
    CannotDeliver,
    GuestMemory,
    deliver,
    pass_over_halt,
)
from stillframe.board.hardware.engine import Engine
from stillframe.board.hardware.interrupts import FIRST_VECTOR, InterruptLines
from stillframe.board.hardware.ports import PortMap
from stillframe.board.hardware.registers import (
    CS,
    FLAG_INTERRUPTS,
    NO_EXCEPTION,
    Registers,
)
from stillframe.capture.signal_protection import prepare_thread
from stillframe.errors import MachineError


class Vcpu(BoardThread):
    """A vCPU.

    ``parked``: it runs nothing until ``resume``; also True before its thread starts.
    """

    def __init__(
        self,
        index: int,
        lock: threading.RLock,
        ports: PortMap,
        space: AddressSpace,
        *,
        on_parked: Callable[[], None],
        on_panic: Callable[[str], None],
        on_failure: Callable[[str], None],
    ) -> None:
        """
        Args:
            on_parked: called each time it has parked.
            on_panic: called with the reason, one line, when the guest cannot go on.
            on_failure: called with the reason when the engine fails.
        """
        super().__init__(f"vcpu{index}", lock)
        self.index = index
        self.parked = True
        self.registers = Registers()
        self.registers.before_save = self._fetch_registers
        self.registers.after_load = self._use_loaded
        self.lines = InterruptLines(self._interrupt_wanted)
        self._ports = ports
        self._engine = Engine(self)
        space.on_add(self._engine.map)
        self._memory = GuestMemory(self._engine, space)
        self._on_parked = on_parked
        self._on_panic = on_panic
        self._on_failure = on_failure
        self._park_wanted = True
        self._running = False
        self._engine_is_newer = False

    # For the board

    def resume(self) -> None:
        """Let it run."""
        self._park_wanted = False
        self.parked = False
        self._wake.notify()

    def park(self) -> None:
        """Make it park soon."""
        self._park_wanted = True
        if self._running:
            self._engine.stop()
        self._wake.notify()

    @property
    def thread_id(self) -> int:
        """The kernel's id of its thread; 0 before the thread starts."""
        return self._thread.native_id or 0

    def quit(self) -> None:
        """End the thread; ``join`` follows."""
        super().quit()
        self.park()

    def reset(self) -> None:
        """Reset registers and interrupt lines as the boot protocol has them before the guest is
        placed. The vCPU must be parked."""
        self.registers.reset()
        self.lines.reset()
        self._engine_is_newer = False
        self._engine.forget_code()

    def close(self) -> None:
        """Release the engine, after the thread has ended."""
        self._engine.close()

    def _fetch_registers(self) -> None:
        if not self.parked:
            raise MachineError(
                f"vCPU {self.index} runs",
                why="its registers cannot be saved",
                guest_state="running",
            )
        if self._engine_is_newer:
            self._engine.read_registers(self.registers)
        level = self.registers.selectors[CS] & 3
        if level:
            raise MachineError(
                f"vCPU {self.index} cannot be saved",
                why=f"it is at privilege level {level}, and the board has level 0 only",
                guest_state="paused",
            )

    def _use_loaded(self) -> None:
        self._engine_is_newer = False
        self._engine.forget_code()

    # For devices, through ``lines``

    def _interrupt_wanted(self) -> None:
        self._wake.notify()
        if self._running:
            self._engine.stop_when_enabled()

    # The engine's ports, in this vCPU's thread, without the lock

    def port_in(self, port: int, size_bytes: int) -> int:
        with self._lock:
            return self._ports.read(port, size_bytes, self.index)

    def port_out(self, port: int, size_bytes: int, value: int) -> None:
        with self._lock:
            self._ports.write(port, size_bytes, value, self.index)

    # The thread

    def _loop(self) -> None:
        with self._lock:
            self._guarded(prepare_thread)
            while not self._quit:
                self._guarded(self._turn)

    def _guarded(self, step: Callable[[], None]) -> None:
        try:
            step()
        except Exception as error:  # noqa: BLE001 - whatever it is, the board must stop
            self._park_wanted = True
            what = str(error) if isinstance(error, UcError) else repr(error)
            self._on_failure(f"vCPU {self.index}: {what}, RIP {self._engine.rip:#x}")

    def _turn(self) -> None:
        if self._park_wanted:
            self._park()
        elif self._must_wait():
            self._wake.wait()
        else:
            self._go_on()

    def _park(self) -> None:
        if not self.parked:
            self.parked = True
            self._on_parked()
        self._wake.wait()

    def _must_wait(self) -> bool:
        registers = self.registers
        if not registers.halted:
            return False
        if self.lines.deliverable and self._flags() & FLAG_INTERRUPTS:
            registers.halted = 0
        return bool(registers.halted)

    def _flags(self) -> int:
        return self._engine.flags if self._engine_is_newer else self.registers.eflags

    def _go_on(self) -> None:
        if not self._engine_is_newer and not self._hand_over():
            return
        registers = self.registers
        vector = registers.exception
        if vector == NO_EXCEPTION and self._engine.flags & FLAG_INTERRUPTS:
            line = self.lines.take()
            vector = NO_EXCEPTION if line is None else FIRST_VECTOR + line
        if vector != NO_EXCEPTION:
            registers.exception = NO_EXCEPTION
            self._deliver(vector, registers.error_code)
            return
        self._run()

    def _hand_over(self) -> bool:
        """Load the registers into the engine; return False if it rejects them."""
        try:
            self._engine.write_registers(self.registers)
        except UcError as error:
            self._park_wanted = True
            self._on_failure(f"vCPU {self.index}: its registers make no sense: {error}")
            return False
        self._engine_is_newer = True
        return True

    def _deliver(self, vector: int, error_code: int) -> None:
        # Without the lock: this writes to guest RAM, and may wait until a page is saved.
        try:
            with _released(self._lock):
                if vector >= EXCEPTIONS:
                    pass_over_halt(self._engine, self._memory)
                deliver(self._engine, self._memory, vector, error_code)
        except CannotDeliver as error:
            kind = "exception" if vector < EXCEPTIONS else "interrupt"
            self._park_wanted = True
            self._on_panic(
                f"vCPU {self.index}: {kind} {vector}, error code {error_code:#x}, "
                f"RIP {self._engine.rip:#x}: {error}"
            )

    def _run(self) -> None:
        self._running = True
        self._engine.clear_stop()
        if self.lines.deliverable:
            self._engine.stop_when_enabled()
        try:
            with _released(self._lock):
                ended = self._engine.run()
        finally:
            self._running = False
        if ended.exception is not None:
            self.registers.exception = ended.exception
            self.registers.error_code = ended.error_code
        elif not ended.stopped:
            self.registers.halted = 1


@contextlib.contextmanager
def _released(lock: threading.RLock) -> Iterator[None]:
    lock.release()
    try:
        yield
    finally:
        lock.acquire()
