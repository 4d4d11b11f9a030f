"""A guest's life cycle: load, start, reset and end.

Source for the events and their order: QEMU ``softmmu/runstate.c`` (main_loop_should_exit,
qemu_system_reset, qemu_system_guest_panicked).
"""

from __future__ import annotations

import logging
import threading

from stillframe.board.hardware.config import BoardConfig
from stillframe.board.hardware.elf import Guest, read_guest
from stillframe.board.hardware.events import Events
from stillframe.board.hardware.hardware import Hardware
from stillframe.board.hardware.layout import STACK_BYTES
from stillframe.board.hardware.power import PANIC, POWER_OFF, RESET
from stillframe.board.hardware.run_control import RunControl

PANIC_STATUS = 134
"""Exit status of a guest that panicked: that of an aborted process."""
FAILURE_STATUS = 70
"""Exit status of a board that failed: that of ``InternalError``."""

logger = logging.getLogger(__name__)


class Life:
    """A guest's life cycle. Call its methods with everything stopped and the board lock held.

    ``exit_status``: an ended guest's, else None. ``ended``: set once it has ended, until a reset.
    """

    def __init__(
        self, config: BoardConfig, hardware: Hardware, control: RunControl, events: Events
    ) -> None:
        self._config = config
        self._hardware = hardware
        self._control = control
        self._events = events
        self._guest: Guest | None = None
        self.exit_status: int | None = None
        self.ended = threading.Event()

    def read_guest(self) -> bool:
        """Read the guest's file; return False if the board has none.

        Raises:
            NotFoundError, UsageError, HostError, DataError: as ``elf.read_guest``.
        """
        path = self._config.guest_path
        if path is not None:
            end_gpa = self._config.ram_bytes - self._config.vcpus * STACK_BYTES
            self._guest = read_guest(path, end_gpa=end_gpa)
        return path is not None

    def begin(self) -> None:
        """Place the guest in RAM that was never written."""
        if self._guest is not None:
            self._hardware.boot(self._guest, fresh=True)

    def begin_again(self, *, guest_asked: bool) -> None:
        """Reset the guest; shut down a board without one."""
        reason = "guest-reset" if guest_asked else "host-qmp-system-reset"
        if self._guest is None:
            logger.error("%s: there is no guest to start again", self._config.name)
            self._events.tell("SHUTDOWN", guest=guest_asked, reason=reason)
            self._end("shutdown", FAILURE_STATUS)
            return
        self._hardware.boot(self._guest, fresh=False)
        if not self._control.running:
            self._control.set_state("prelaunch")
        self.exit_status = None
        self.ended.clear()
        self._events.tell("RESET", guest=guest_asked, reason=reason)

    def serve(self, request: int) -> None:
        """Carry out a guest request; see ``power``. A request that fails ends the guest."""
        try:
            self._carry_out(request)
        except Exception:  # somebody waits for the end
            logger.exception("%s: request %d of the guest has failed", self._config.name, request)
            self._end("internal-error", FAILURE_STATUS)

    def _carry_out(self, request: int) -> None:
        power = self._hardware.power
        if request == RESET:
            self.begin_again(guest_asked=True)
        elif request == POWER_OFF:
            self._events.tell("SHUTDOWN", guest=True, reason="guest-shutdown")
            self._end("shutdown", power.status)
        elif request == PANIC:
            logger.error("%s: the guest panicked: %s", self._config.name, power.reason)
            self._events.tell("GUEST_PANICKED", action="pause")
            self._end("guest-panicked", PANIC_STATUS)
        else:
            logger.error("%s: the board failed: %s", self._config.name, power.reason)
            self._end("internal-error", FAILURE_STATUS)

    def _end(self, state: str, exit_status: int) -> None:
        was_running = self._control.running
        self._control.set_state(state)
        if was_running:
            self._events.tell("STOP")
        self.exit_status = exit_status
        self.ended.set()
