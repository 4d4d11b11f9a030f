"""The 16550 as a driver sees it."""

from __future__ import annotations

import pytest

from stillframe.board.hardware.interrupts import LINE_UART, InterruptLines
from stillframe.board.hardware.uart import (
    DATA,
    IER,
    IIR_FCR,
    LCR,
    LSR,
    MCR,
    MSR,
    SCR,
    Uart,
)


class Line:
    """Takes ``room`` bytes."""

    def __init__(self) -> None:
        self.sent = bytearray()
        self.room = 1 << 20
        self.asked = 0

    def send(self, data: bytes) -> int:
        taken = min(len(data), self.room)
        self.room -= taken
        self.sent += data[:taken]
        return taken

    def may_receive(self) -> None:
        self.asked += 1


class Driver:
    """A UART with both its ends in hand."""

    def __init__(self) -> None:
        self.lines = InterruptLines(lambda: None)
        self.uart = Uart(self.lines)
        self.line = Line()
        self.uart.connect(self.line)
        self[MCR] = 0x0B

    def __getitem__(self, offset: int) -> int:
        return self.uart.read_port(offset, 1, 0)

    def __setitem__(self, offset: int, value: int) -> None:
        self.uart.write_port(offset, 1, value, 0)

    def interrupted(self) -> bool:
        """Whether the line was raised since the last call."""
        raised = bool(self.lines.pending & 1 << LINE_UART)
        self.lines.clear(1 << LINE_UART)
        return raised


@pytest.fixture
def driver() -> Driver:
    return Driver()


def test_registers_after_reset() -> None:
    uart = Uart(InterruptLines(lambda: None))
    assert [uart.read_port(offset, 1, 0) for offset in range(8)] == [0, 0, 1, 0, 0, 0x60, 0xB0, 0]


def test_divisor_latch_and_scratch(driver: Driver) -> None:
    driver[LCR] = 0x80
    driver[DATA], driver[IER] = 0x34, 0x12
    assert (driver[DATA], driver[IER]) == (0x34, 0x12)
    driver[LCR] = 0x03
    driver[SCR] = 0xA5
    assert (driver[LCR], driver[SCR], driver[IER], driver.uart.divisor) == (3, 0xA5, 0, 0x1234)
    assert not driver.line.sent


def test_sending(driver: Driver) -> None:
    driver[IER] = 2
    assert driver.interrupted()
    assert driver[IIR_FCR] == 2
    assert driver[IIR_FCR] == 1  # reading it ends it
    for byte in b"text":
        driver[DATA] = byte
        assert driver.interrupted()
    assert driver.line.sent == b"text"


def test_sending_without_reading_the_cause_interrupts_each_time(driver: Driver) -> None:
    driver[IER] = 2
    assert driver.interrupted()
    for _ in range(3):
        driver[DATA] = 1
        assert driver.interrupted()


def test_a_line_that_takes_nothing(driver: Driver) -> None:
    driver[IIR_FCR] = 1
    driver.line.room = 2
    for byte in b"abcdefgh":
        driver[DATA] = byte
    assert driver.line.sent == b"ab"
    assert driver[LSR] == 0
    driver[IER] = 2
    assert not driver.interrupted()
    driver.line.room = 100
    driver.uart.can_send()
    assert driver.line.sent == b"abcdefgh"
    assert driver[LSR] == 0x60
    assert driver.interrupted()


def test_more_than_the_fifo_holds_is_overwritten(driver: Driver) -> None:
    driver.line.room = 0
    driver[IIR_FCR] = 1
    for byte in range(20):
        driver[DATA] = byte
    driver.line.room = 100
    driver.uart.can_send()
    assert driver.line.sent == bytes([*range(15), 19])


def test_receiving_with_fifos(driver: Driver) -> None:
    driver[IIR_FCR] = 0x81  # interrupt at 8 bytes
    driver[IER] = 1
    driver.uart.receive(b"abc")
    assert driver.interrupted()
    assert driver[IIR_FCR] == 0xCC  # few bytes, and the line is quiet
    driver.uart.receive(b"defgh")
    assert driver.interrupted()
    assert driver[IIR_FCR] == 0xC4
    assert driver.uart.receive_room() == 8
    received = bytearray()
    while driver[LSR] & 1:
        received.append(driver[DATA])
    assert received == b"abcdefgh"
    assert driver[IIR_FCR] == 0xC1
    assert driver.line.asked
    driver.interrupted()
    driver.uart.receive(b"x")
    assert driver.interrupted()


def test_receiving_without_fifos(driver: Driver) -> None:
    assert driver.uart.receive_room() == 1
    driver.uart.receive(b"a")
    assert driver.uart.receive_room() == 0
    assert not driver.interrupted()
    driver[IER] = 1
    assert driver.interrupted()
    assert driver[IIR_FCR] == 4
    assert driver[DATA] == ord("a")


def test_clearing_fifos(driver: Driver) -> None:
    driver[IIR_FCR] = 1
    driver.line.room = 0
    driver[DATA] = 1
    driver.uart.receive(b"abc")
    driver[IIR_FCR] = 1 | 2
    assert driver[LSR] & 1 == 0
    assert driver[LSR] & 0x20 == 0
    driver[IIR_FCR] = 1 | 4
    assert driver[LSR] == 0x60
    driver.uart.receive(b"abc")
    driver[IIR_FCR] = 0  # turning them off clears them
    assert driver[LSR] & 1 == 0
    assert driver[IIR_FCR] & 0xC0 == 0


def test_loop_mode_as_drivers_probe_it(driver: Driver) -> None:
    # Linux, drivers/tty/serial/8250/8250_port.c: autoconfig
    driver[MCR] = 0x10 | 0x0A
    assert driver[MSR] & 0xF0 == 0x90
    driver[MCR] = 0x10 | 0x05
    assert driver[MSR] & 0xF0 == 0x60
    driver[DATA] = 0x5A
    assert driver[LSR] & 1
    assert driver[DATA] == 0x5A
    assert driver.uart.receive_room() == 0
    assert not driver.line.sent
    driver[IER] = 1
    driver[DATA] = 1
    assert driver.interrupted()


def test_loop_mode_overruns(driver: Driver) -> None:
    driver[MCR] = 0x10
    driver[IER] = 4
    driver[DATA] = 1
    driver[DATA] = 2
    assert driver.interrupted()
    assert driver[IIR_FCR] == 6
    assert driver[LSR] & 2
    assert driver[LSR] & 2 == 0
    assert driver[DATA] == 1


def test_modem_status_interrupts(driver: Driver) -> None:
    driver[MSR]
    driver[IER] = 8
    driver[MCR] = 0x10 | 0x0B
    driver[MCR] = 0x10 | 0x09
    assert driver.interrupted()
    assert driver[IIR_FCR] == 0
    assert driver[MSR] & 1
    assert driver[IIR_FCR] == 1


def test_out2_gates_interrupts(driver: Driver) -> None:
    driver[MCR] = 0x03
    driver[IER] = 3
    driver.uart.receive(b"a")
    assert not driver.interrupted()
    driver[MCR] = 0x0B
    assert driver.interrupted()


def test_nobody_at_the_other_end() -> None:
    uart = Uart(InterruptLines(lambda: None))
    for byte in b"gone":
        uart.write_port(DATA, 1, byte, 0)
    assert uart.read_port(LSR, 1, 0) == 0x60


def test_a_cause_that_stays_interrupts_once(driver: Driver) -> None:
    driver[IER] = 1
    driver.uart.receive(b"a")
    assert driver.interrupted()
    driver[SCR] = 1
    assert driver[LSR] & 1
    driver[MCR] = 0x0B
    assert not driver.interrupted()
