"""Power off, reset, panic, and the power button (ports 0x560, 0x564, 0x5c0).

The board's control thread carries out the guest's requests, since a vCPU cannot wait for itself to
stop. A pending request is device state, so it survives if the board is stopped and saved first.
"""

from __future__ import annotations

from collections.abc import Callable

from stillframe.board.hardware.interrupts import LINE_POWER, InterruptLines
from stillframe.board.state.fields import StateDescription, boolean, u8

NOTHING, RESET, POWER_OFF, PANIC, FAILURE = range(5)
_POWER_OFF_KEY = 0x5F0F


class Power:
    """The guest's requests and the power button. Guarded by the board lock.

    ``request``: the pending one. ``status``: the exit status of a guest that powers off.
    ``reason``: why the guest panicked or the board failed, for the log.
    """

    BUTTON, RESET = 0, 4
    COUNT = 8

    def __init__(self, lines: InterruptLines, asked: Callable[[], None]) -> None:
        """
        Args:
            lines: those of the vCPU that the button interrupts.
            asked: called on a new request, for the board's control thread to take.
        """
        self._lines = lines
        self._asked = asked
        self.reset()

    def reset(self) -> None:
        self.button = False
        self.request = NOTHING
        self.status = 0
        self.reason = ""

    def press(self) -> None:
        """Press the power button."""
        self.button = True
        self._lines.raise_line(LINE_POWER)

    def fail(self, reason: str) -> None:
        """Report that the board itself cannot go on.

        Args:
            reason: one line, for the log.
        """
        self.ask(FAILURE, reason=reason)

    def ask(self, request: int, *, status: int = 0, reason: str = "") -> None:
        """Record a request, unless one is pending.

        Args:
            status: the exit status of a guest that powers off.
        """
        if self.request == NOTHING:
            self.request = request
            self.status = status
            self.reason = reason
            self._asked()

    def panic(self, reason: str) -> None:
        """Report that the guest cannot go on.

        Args:
            reason: one line, for the log.
        """
        self.ask(PANIC, reason=reason)

    def read_port(self, offset: int, size_bytes: int, vcpu: int) -> int:
        if offset != self.BUTTON:
            return 0
        pressed, self.button = self.button, False
        return int(pressed)

    def write_port(self, offset: int, size_bytes: int, value: int, vcpu: int) -> None:
        if offset == self.RESET:
            self.ask(RESET)
        elif offset == self.BUTTON and value & 0xFFFF == _POWER_OFF_KEY:
            self.ask(POWER_OFF, status=value >> 16 & 0xFF)


class PanicPort:
    """The port on which a guest reports a panic."""

    COUNT = 4

    def __init__(self, power: Power) -> None:
        self._power = power

    def read_port(self, offset: int, size_bytes: int, vcpu: int) -> int:
        return 0

    def write_port(self, offset: int, size_bytes: int, value: int, vcpu: int) -> None:
        if offset == 0:
            self._power.panic(f"vCPU {vcpu} says so")


def _check(power: Power, version_id: int) -> None:
    if power.request > FAILURE:
        raise ValueError(f"there is no request {power.request}")
    power.reason = "it was saved so"


POWER = StateDescription(
    name="power",
    version_id=1,
    minimum_version_id=1,
    fields=(boolean("button"), u8("request"), u8("status")),
    post_load=_check,
)
