"""The vCPUs' interrupt lines, enabled and pending (ports 0x5a0 to 0x5a8)."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from stillframe.board.state.fields import StateDescription, u32

LINE_TIMER = 2
LINE_WAKE = 3
LINE_UART = 4
LINE_BLOCK = 5
LINE_ENTROPY = 6
LINE_POWER = 7

FIRST_VECTOR = 0x20
"""Line *n* interrupts with vector ``FIRST_VECTOR + n``."""
_LINES = 16
_MASK = (1 << _LINES) - 1


class InterruptLines:
    """The lines of one vCPU. Guarded by the board lock."""

    def __init__(self, wanted: Callable[[], None]) -> None:
        """
        Args:
            wanted: called when the vCPU has an interrupt to take that it may not know about.
        """
        self._wanted = wanted
        self.enabled = 0
        self.pending = 0

    def reset(self) -> None:
        self.enabled = 0
        self.pending = 0

    @property
    def deliverable(self) -> int:
        """The mask of lines that interrupt as soon as RFLAGS.IF allows it."""
        return self.enabled & self.pending

    def raise_line(self, line: int) -> None:
        self.pending |= 1 << line
        if self.deliverable:
            self._wanted()

    def enable(self, mask: int) -> None:
        self.enabled = mask & _MASK
        if self.deliverable:
            self._wanted()

    def clear(self, mask: int) -> None:
        self.pending &= ~mask

    def take(self) -> int | None:
        """Return the lowest deliverable line, no longer pending then; None if there is none."""
        ready = self.deliverable
        if not ready:
            return None
        line = (ready & -ready).bit_length() - 1
        self.pending &= ~(1 << line)
        return line


def _check(lines: InterruptLines, version_id: int) -> None:
    if (lines.enabled | lines.pending) & ~_MASK:
        raise ValueError(f"there are {_LINES} interrupt lines")


INTERRUPT_LINES = StateDescription(
    name="interrupts",
    version_id=1,
    minimum_version_id=1,
    fields=(u32("enabled"), u32("pending")),
    post_load=_check,
)


class InterruptPorts:
    """The ports through which each vCPU sees its own lines and wakes others."""

    ENABLED, PENDING, WAKE = 0, 4, 8
    COUNT = 12

    def __init__(self, lines: Sequence[InterruptLines]) -> None:
        self._lines = lines

    def read_port(self, offset: int, size_bytes: int, vcpu: int) -> int:
        if offset == self.ENABLED:
            return self._lines[vcpu].enabled
        if offset == self.PENDING:
            return self._lines[vcpu].pending
        return 0

    def write_port(self, offset: int, size_bytes: int, value: int, vcpu: int) -> None:
        if offset == self.ENABLED:
            self._lines[vcpu].enable(value)
        elif offset == self.PENDING:
            self._lines[vcpu].clear(value)
        elif offset == self.WAKE and value < len(self._lines):
            self._lines[value].raise_line(LINE_WAKE)
