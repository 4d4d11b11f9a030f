"""The board's one timer, one-shot or periodic, on the virtual clock (ports 0x510 to 0x518)."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from stillframe.board.hardware.clock import Clock
from stillframe.board.hardware.interrupts import LINE_TIMER, InterruptLines
from stillframe.board.state.fields import StateDescription, i64, u8, u32, u64

OFF, ONE_SHOT, PERIODIC = 0, 1, 2
_MODE_MASK = 3
_VCPU_SHIFT, _VCPU_MASK = 8, 7
_MOST_EXPIRATIONS = 0xFFFFFFFF
_LAST_NS = (1 << 63) - 1
NOT_ARMED = -1
"""QEMU's saved value for a timer that is not armed."""


class Timer:
    """The timer. Guarded by the board lock. The alarm thread calls ``expire`` at ``deadline_ns``.

    ``deadline_ns``: on the virtual clock, so the remaining time survives stop, save and load.
    """

    INTERVAL_LOW, INTERVAL_HIGH, CONTROL = 0, 4, 8
    COUNT = 12

    def __init__(
        self, clock: Clock, lines: Sequence[InterruptLines], rearmed: Callable[[], None]
    ) -> None:
        """
        Args:
            rearmed: called when the deadline changes, to wake the alarm thread.
        """
        self._clock = clock
        self._lines = lines
        self._rearmed = rearmed
        self.reset()

    def reset(self) -> None:
        self.interval_ns = 0
        self.mode = OFF
        self.vcpu = 0
        self.expirations = 0
        self.deadline_ns = NOT_ARMED

    @property
    def vcpus(self) -> int:
        """The number of vCPUs."""
        return len(self._lines)

    def read_port(self, offset: int, size_bytes: int, vcpu: int) -> int:
        if offset != self.CONTROL:
            return 0
        seen, self.expirations = self.expirations, 0
        return seen

    def write_port(self, offset: int, size_bytes: int, value: int, vcpu: int) -> None:
        if offset == self.INTERVAL_LOW:
            self.interval_ns = self.interval_ns >> 32 << 32 | value
        elif offset == self.INTERVAL_HIGH:
            self.interval_ns = value << 32 | self.interval_ns & 0xFFFFFFFF
        elif offset == self.CONTROL:
            self._control(value)

    def _control(self, value: int) -> None:
        mode = value & _MODE_MASK
        self.mode = mode if mode in (ONE_SHOT, PERIODIC) else OFF
        # A vCPU that does not exist has no line; interrupt the first one.
        vcpu = value >> _VCPU_SHIFT & _VCPU_MASK
        self.vcpu = vcpu if vcpu < self.vcpus else 0
        self.expirations = 0
        if self.mode == OFF:
            self.deadline_ns = NOT_ARMED
        else:
            self.deadline_ns = min(self._clock.now_ns() + max(self.interval_ns, 1), _LAST_NS)
        self._rearmed()

    def expire(self) -> None:
        """Count the expirations up to now, and interrupt; do nothing before the deadline."""
        now_ns = self._clock.now_ns()
        if self.deadline_ns == NOT_ARMED or now_ns < self.deadline_ns:
            return
        if self.mode == PERIODIC:
            interval_ns = max(self.interval_ns, 1)
            passed = 1 + (now_ns - self.deadline_ns) // interval_ns
            self.deadline_ns = min(self.deadline_ns + passed * interval_ns, _LAST_NS)
        else:
            passed = 1
            self.mode = OFF
            self.deadline_ns = NOT_ARMED
        self.expirations = min(self.expirations + passed, _MOST_EXPIRATIONS)
        self._lines[self.vcpu].raise_line(LINE_TIMER)


def _check(timer: Timer, version_id: int) -> None:
    if timer.mode > PERIODIC:
        raise ValueError(f"a timer has no mode {timer.mode}")
    if timer.vcpu >= timer.vcpus:
        raise ValueError(f"it interrupts vCPU {timer.vcpu}, there are {timer.vcpus}")
    if timer.deadline_ns < NOT_ARMED or (timer.deadline_ns == NOT_ARMED) != (timer.mode == OFF):
        raise ValueError(f"mode {timer.mode} with deadline {timer.deadline_ns}")


TIMER = StateDescription(
    name="timer",
    version_id=1,
    minimum_version_id=1,
    fields=(
        u64("interval_ns"),
        u8("mode"),
        u8("vcpu"),
        u32("expirations"),
        i64("deadline_ns"),
    ),
    post_load=_check,
)
