"""The serial port: a 16550A (ports 0x3f8 to 0x3ff, line 4).

Source: PC16550D data sheet (National Semiconductor); QEMU ``hw/char/serial.c``. Characters take no
time: the line is idle right after the last one.
"""

from __future__ import annotations

from typing import Protocol

from stillframe.board.hardware.interrupts import LINE_UART, InterruptLines
from stillframe.board.state.fields import StateDescription, boolean, u8, u16, variable_buffer

FIFO_BYTES = 16
_TRIGGERS = (1, 4, 8, 14)

DATA, IER, IIR_FCR, LCR, MCR, LSR, MSR, SCR = range(8)

IER_RECEIVED, IER_TRANSMITTED, IER_LINE, IER_MODEM = 1, 2, 4, 8
IIR_NONE, IIR_MODEM, IIR_TRANSMITTED, IIR_RECEIVED, IIR_LINE, IIR_TIMEOUT = 1, 0, 2, 4, 6, 0xC
_IIR_FIFOS = 0xC0
FCR_ENABLE, FCR_CLEAR_RECEIVER, FCR_CLEAR_TRANSMITTER = 1, 2, 4
LCR_DIVISOR, LCR_BREAK = 0x80, 0x40
MCR_DTR, MCR_RTS, MCR_OUT1, MCR_OUT2, MCR_LOOP = 1, 2, 4, 8, 0x10
LSR_DATA, LSR_OVERRUN, LSR_BREAK, LSR_THR_EMPTY, LSR_IDLE = 1, 2, 0x10, 0x20, 0x40
_LSR_ERRORS = 0x1E
_MSR_DELTAS = 0x0F
_MSR_RING_ENDED = 0x04
_MSR_RING = 0x40
_MSR_CONNECTED = 0xB0
"""DCD, DSR and CTS: the other end always seems connected."""
_DIVISOR_9600 = 12


class SerialLine(Protocol):
    """The other end of the line. Called with the board lock held."""

    def send(self, data: bytes) -> int:
        """Take what fits now; return how much. Call ``Uart.can_send`` once more fits."""

    def may_receive(self) -> None:
        """Take note that the UART has room again."""


class Uart:
    """The device. Guarded by the board lock.

    ``received``, ``to_send``: the FIFOs, of one byte each unless FCR enables them.
    """

    COUNT = 8

    def __init__(self, lines: InterruptLines) -> None:
        self._lines = lines
        self._line: SerialLine | None = None
        self.received = bytearray()
        self.to_send = bytearray()
        self.received_bytes = self.to_send_bytes = 0
        self.reset()

    def connect(self, line: SerialLine | None) -> None:
        """Set the line; without one, output is discarded."""
        self._line = line

    def reset(self) -> None:
        self.divisor = _DIVISOR_9600
        self.ier = self.fcr = self.lcr = self.mcr = self.scr = 0
        self.errors = 0
        self.msr = _MSR_CONNECTED
        self.transmitted = False
        self.received.clear()
        self.to_send.clear()
        self._cause = IIR_NONE

    # The other end

    def receive_room(self) -> int:
        """Return how many bytes ``receive`` takes now."""
        if self.mcr & MCR_LOOP:
            return 0
        return self.fifo_bytes - len(self.received)

    def receive(self, data: bytes) -> None:
        """Take bytes from the line, at most ``receive_room``."""
        self.received += data
        self._update()

    def can_send(self) -> None:
        """Send what waits: the line takes bytes again."""
        self._transmit()
        self._update()

    # The ports

    def read_port(self, offset: int, size_bytes: int, vcpu: int) -> int:
        if self.lcr & LCR_DIVISOR and offset in (DATA, IER):
            return self.divisor >> 8 if offset == IER else self.divisor & 0xFF
        if offset == DATA:
            return self._read_data()
        if offset == IER:
            return self.ier
        if offset == IIR_FCR:
            return self._read_identification()
        if offset == LCR:
            return self.lcr
        if offset == MCR:
            return self.mcr
        if offset == LSR:
            status = self.line_status
            self.errors = 0
            self._update()
            return status
        if offset == MSR:
            status = self.modem_status
            self.msr &= ~_MSR_DELTAS
            self._update()
            return status
        return self.scr

    def write_port(self, offset: int, size_bytes: int, value: int, vcpu: int) -> None:
        value &= 0xFF
        if self.lcr & LCR_DIVISOR and offset in (DATA, IER):
            if offset == DATA:
                self.divisor = self.divisor & 0xFF00 | value
            else:
                self.divisor = self.divisor & 0xFF | value << 8
            return
        if offset == DATA:
            self._write_data(value)
        elif offset == IER:
            # Enabling it while the transmitter is empty interrupts (data sheet, 8.4).
            if value & IER_TRANSMITTED and not self.ier & IER_TRANSMITTED and not self.to_send:
                self.transmitted = True
            self.ier = value & 0x0F
        elif offset == IIR_FCR:
            self._control_fifos(value)
        elif offset == LCR:
            self.lcr = value
        elif offset == MCR:
            self._control_modem(value & 0x1F)
        elif offset == SCR:
            self.scr = value
        self._update()

    @property
    def line_status(self) -> int:
        status = self.errors
        if self.received:
            status |= LSR_DATA
        if not self.to_send:
            status |= LSR_THR_EMPTY | LSR_IDLE
        return status

    @property
    def modem_status(self) -> int:
        return self._loop_status() | self.msr & _MSR_DELTAS if self.mcr & MCR_LOOP else self.msr

    @property
    def fifo_bytes(self) -> int:
        """How many bytes each FIFO holds."""
        return FIFO_BYTES if self.fcr & FCR_ENABLE else 1

    def _read_data(self) -> int:
        if not self.received:
            return 0
        value = self.received.pop(0)
        self._update()
        if self._line is not None and not self.received:
            self._line.may_receive()
        return value

    def _read_identification(self) -> int:
        cause = self._find_cause()
        if cause == IIR_TRANSMITTED:
            self.transmitted = False
            self._update()
        return cause | (_IIR_FIFOS if self.fcr & FCR_ENABLE else 0)

    def _write_data(self, value: int) -> None:
        self.transmitted = False
        self._update()
        if self.mcr & MCR_LOOP:
            if len(self.received) < self.fifo_bytes:
                self.received.append(value)
            else:
                self.errors |= LSR_OVERRUN
            self.transmitted = True
            return
        if len(self.to_send) >= self.fifo_bytes:
            # As real hardware does, overwrite the newest waiting byte.
            self.to_send[-1] = value
        else:
            self.to_send.append(value)
        self._transmit()

    def _transmit(self) -> None:
        if not self.to_send:
            return
        taken = len(self.to_send) if self._line is None else self._line.send(bytes(self.to_send))
        del self.to_send[:taken]
        if not self.to_send:
            self.transmitted = True

    def _control_fifos(self, value: int) -> None:
        if (value ^ self.fcr) & FCR_ENABLE:
            value |= FCR_CLEAR_RECEIVER | FCR_CLEAR_TRANSMITTER
        if value & FCR_CLEAR_RECEIVER:
            self.received.clear()
            if self._line is not None:
                self._line.may_receive()
        if value & FCR_CLEAR_TRANSMITTER:
            self.to_send.clear()
            self.transmitted = True
        self.fcr = value & 0xC9 if value & FCR_ENABLE else 0

    def _control_modem(self, value: int) -> None:
        before = self.modem_status
        self.mcr = value
        after = self.modem_status
        self.msr |= (before ^ after) >> 4 & ~_MSR_RING_ENDED & _MSR_DELTAS
        if before & _MSR_RING and not after & _MSR_RING:
            self.msr |= _MSR_RING_ENDED
        if self._line is not None and not value & MCR_LOOP:
            self._line.may_receive()

    def _loop_status(self) -> int:
        """Return the modem outputs as the inputs that loop mode makes of them (data sheet, 8.7)."""
        return (
            (self.mcr & MCR_RTS) << 3
            | (self.mcr & MCR_DTR) << 5
            | (self.mcr & MCR_OUT1) << 4
            | (self.mcr & MCR_OUT2) << 4
        )

    def _find_cause(self) -> int:
        """Return the cause of highest priority, as IIR encodes it (data sheet, table IV)."""
        if self.ier & IER_LINE and self.errors & _LSR_ERRORS:
            return IIR_LINE
        if self.ier & IER_RECEIVED and self.received:
            if not self.fcr & FCR_ENABLE or len(self.received) >= _TRIGGERS[self.fcr >> 6]:
                return IIR_RECEIVED
            return IIR_TIMEOUT
        if self.ier & IER_TRANSMITTED and self.transmitted:
            return IIR_TRANSMITTED
        if self.ier & IER_MODEM and self.msr & _MSR_DELTAS:
            return IIR_MODEM
        return IIR_NONE

    def _update(self) -> None:
        """Interrupt if there is a new cause."""
        before = self._cause
        self.settle()
        if self._cause not in (IIR_NONE, before):
            self._lines.raise_line(LINE_UART)

    def settle(self) -> None:
        """Derive the cause from the registers, without an interrupt."""
        # OUT2 gates interrupts on a PC; in loop mode they are fully operational (data sheet, 8.7).
        gate = self.mcr & (MCR_OUT2 | MCR_LOOP)
        self._cause = self._find_cause() if gate else IIR_NONE


def _save(uart: Uart) -> None:
    uart.received_bytes = len(uart.received)
    uart.to_send_bytes = len(uart.to_send)


def _loaded(uart: Uart, version_id: int) -> None:
    if max(len(uart.received), len(uart.to_send)) > uart.fifo_bytes:
        raise ValueError("its FIFOs hold more than fits")
    uart.settle()


UART = StateDescription(
    name="serial",
    version_id=1,
    minimum_version_id=1,
    fields=(
        u16("divisor"),
        u8("ier"),
        u8("fcr"),
        u8("lcr"),
        u8("mcr"),
        u8("errors"),
        u8("msr"),
        u8("scr"),
        boolean("transmitted"),
        u8("received_bytes"),
        variable_buffer("received", "received_bytes", limit_bytes=FIFO_BYTES),
        u8("to_send_bytes"),
        variable_buffer("to_send", "to_send_bytes", limit_bytes=FIFO_BYTES),
    ),
    pre_save=_save,
    post_load=_loaded,
)
