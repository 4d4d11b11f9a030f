"""The small devices: ports, lines, clock, timer, lock units, power."""

from __future__ import annotations

import pytest

from stillframe.board.hardware import clock as clock_module
from stillframe.board.hardware.clock import Clock
from stillframe.board.hardware.interrupts import (
    LINE_POWER,
    LINE_TIMER,
    LINE_WAKE,
    InterruptLines,
    InterruptPorts,
)
from stillframe.board.hardware.locks import LockUnits
from stillframe.board.hardware.ports import PortMap
from stillframe.board.hardware.power import NOTHING, PANIC, POWER_OFF, RESET, PanicPort, Power
from stillframe.board.hardware.timer import NOT_ARMED, Timer


class Host:
    """The host's monotonic clock, which the test moves."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.now_ns = 5_000_000_000
        monkeypatch.setattr(clock_module.time, "monotonic_ns", lambda: self.now_ns)


@pytest.fixture
def host(monkeypatch: pytest.MonkeyPatch) -> Host:
    return Host(monkeypatch)


def lines(count: int = 2) -> list[InterruptLines]:
    return [InterruptLines(lambda: None) for _ in range(count)]


def test_ports_of_all_sizes() -> None:
    ports = PortMap()
    units = LockUnits()
    ports.add(0x580, 16, units)
    assert ports.read(0x581, 1, 0) == 1
    assert ports.read(0x581, 4, 0) == 0
    assert [ports.read(0x99, size, 0) for size in (1, 2, 4)] == [0xFF, 0xFFFF, 0xFFFFFFFF]
    ports.write(0x99, 4, 1, 0)
    with pytest.raises(ValueError, match="0x58f"):
        ports.add(0x58F, 1, units)


def test_lines_are_taken_lowest_first_and_once() -> None:
    told: list[int] = []
    one = InterruptLines(lambda: told.append(1))
    one.raise_line(5)
    assert one.take() is None
    assert not told
    one.enable(1 << 5 | 1 << 2 | 1 << 20)
    assert one.enabled == 1 << 5 | 1 << 2
    assert told
    one.raise_line(2)
    one.raise_line(9)
    assert (one.take(), one.take(), one.take()) == (2, 5, None)
    assert one.pending == 1 << 9


def test_interrupt_ports_are_each_vcpus_own() -> None:
    both = lines()
    ports = InterruptPorts(both)
    ports.write_port(InterruptPorts.ENABLED, 4, 8, 1)
    assert ports.read_port(InterruptPorts.ENABLED, 4, 0) == 0
    assert ports.read_port(InterruptPorts.ENABLED, 4, 1) == 8
    ports.write_port(InterruptPorts.WAKE, 4, 1, 0)
    ports.write_port(InterruptPorts.WAKE, 4, 7, 0)  # nobody
    assert both[0].pending == 0
    assert ports.read_port(InterruptPorts.PENDING, 4, 1) == 1 << LINE_WAKE
    ports.write_port(InterruptPorts.PENDING, 4, 1 << LINE_WAKE, 1)
    assert both[1].pending == 0


def test_the_clock_stands_still_while_stopped(host: Host) -> None:
    clock = Clock()
    assert clock.now_ns() == 0
    clock.start()
    host.now_ns += (7 << 32) + 5
    assert clock.read_port(Clock.LOW, 4, 1) == 5
    host.now_ns += 1 << 33
    assert clock.read_port(Clock.LOW, 4, 0) == 5
    assert clock.read_port(Clock.HIGH, 4, 1) == 7  # latched when vCPU 1 read the low word
    assert clock.read_port(Clock.HIGH, 4, 0) == 9
    clock.stop()
    clock.stop()
    host.now_ns += 1000
    assert clock.now_ns() == (9 << 32) + 5
    clock.start()
    clock.start()
    host.now_ns += 2
    clock.write_port(Clock.LOW, 4, 0, 0)
    assert clock.now_ns() == (9 << 32) + 7


def timer_of(clock: Clock) -> tuple[Timer, list[InterruptLines], list[int]]:
    both, rearmed = lines(), []
    return Timer(clock, both, lambda: rearmed.append(1)), both, rearmed


def test_one_shot(host: Host) -> None:
    clock = Clock()
    clock.start()
    timer, both, rearmed = timer_of(clock)
    timer.write_port(Timer.INTERVAL_LOW, 4, 100, 0)
    timer.write_port(Timer.INTERVAL_HIGH, 4, 1, 0)
    timer.write_port(Timer.CONTROL, 4, 1 | 1 << 8, 0)
    assert rearmed
    assert timer.deadline_ns == (1 << 32) + 100
    host.now_ns += (1 << 32) + 99
    timer.expire()
    assert timer.read_port(Timer.CONTROL, 4, 0) == 0
    host.now_ns += 1
    timer.expire()
    timer.expire()
    assert (both[0].pending, both[1].pending) == (0, 1 << LINE_TIMER)
    assert timer.read_port(Timer.CONTROL, 4, 0) == 1
    assert timer.read_port(Timer.CONTROL, 4, 0) == 0
    assert timer.deadline_ns == NOT_ARMED


def test_periodic_counts_what_was_missed(host: Host) -> None:
    clock = Clock()
    clock.start()
    timer, both, _ = timer_of(clock)
    timer.write_port(Timer.INTERVAL_LOW, 4, 1000, 0)
    timer.write_port(Timer.CONTROL, 4, 2 | 7 << 8, 0)  # a vCPU that is not there: the first
    host.now_ns += 3500
    timer.expire()
    assert both[0].pending == 1 << LINE_TIMER
    assert timer.read_port(Timer.CONTROL, 4, 0) == 3
    assert timer.deadline_ns == 4000
    clock.stop()
    host.now_ns += 10**9
    timer.expire()
    assert timer.read_port(Timer.CONTROL, 4, 0) == 0
    clock.start()
    host.now_ns += 500
    timer.expire()
    assert timer.read_port(Timer.CONTROL, 4, 0) == 1
    timer.write_port(Timer.CONTROL, 4, 0, 0)
    assert timer.deadline_ns == NOT_ARMED
    timer.write_port(Timer.CONTROL, 4, 3, 0)  # no such mode
    assert timer.deadline_ns == NOT_ARMED


def test_a_timer_of_no_time_at_all(host: Host) -> None:
    clock = Clock()
    clock.start()
    timer, _, _ = timer_of(clock)
    timer.write_port(Timer.CONTROL, 4, 2, 0)
    host.now_ns += 10**18
    timer.expire()
    assert timer.read_port(Timer.CONTROL, 4, 0) == 0xFFFFFFFF  # as many as it can tell


def test_lock_units() -> None:
    units = LockUnits()
    assert [units.read_port(3, 1, cpu) for cpu in (0, 1)] == [1, 0]
    assert units.read_port(4, 1, 1) == 1
    units.write_port(3, 1, 0, 1)
    assert units.read_port(3, 1, 1) == 1
    units.reset()
    assert not any(units.held)


def test_power() -> None:
    [first] = lines(1)
    asked: list[int] = []
    power = Power(first, lambda: asked.append(1))
    assert power.read_port(Power.BUTTON, 4, 0) == 0
    power.press()
    assert first.pending == 1 << LINE_POWER
    assert (power.read_port(Power.BUTTON, 4, 0), power.read_port(Power.BUTTON, 4, 0)) == (1, 0)
    power.write_port(Power.BUTTON, 4, 0x1234, 0)
    assert power.request == NOTHING
    power.write_port(Power.BUTTON, 4, 0xFF695F0F, 0)
    assert (power.request, power.status) == (POWER_OFF, 0x69)
    power.write_port(Power.RESET, 4, 1, 0)  # too late
    assert power.request == POWER_OFF
    assert asked == [1]
    power.reset()
    power.write_port(Power.RESET, 4, 1, 0)
    assert power.request == RESET
    power.reset()
    PanicPort(power).write_port(0, 4, 1, 3)
    assert (power.request, power.reason) == (PANIC, "vCPU 3 says so")
