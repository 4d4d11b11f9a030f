"""What the serial line can end in."""

from __future__ import annotations

import os
import socket
import threading
from pathlib import Path

import pytest

from stillframe.board.hardware.interrupts import InterruptLines
from stillframe.board.hardware.serial_channels import Channel, Descriptors, UnixSocket, open_channel
from stillframe.board.hardware.serial_port import SerialPort
from stillframe.board.hardware.uart import DATA, IIR_FCR, LSR, Uart
from stillframe.errors import BusyError, UsageError

TIMEOUT_S = 20.0


class Port:
    """A UART with a channel and its thread; ended on leaving."""

    def __init__(self, channel: Channel) -> None:
        self.lock = threading.RLock()
        self.uart = Uart(InterruptLines(lambda: None))
        self.port = SerialPort(self.lock, self.uart, channel)

    def __enter__(self) -> Port:
        self.port.start_thread()
        with self.lock:
            self.port.resume()
            self.uart.write_port(IIR_FCR, 1, 1, 0)
        return self

    def __exit__(self, *_: object) -> None:
        self.port.close()

    def send(self, text: bytes) -> None:
        for byte in text:
            while True:
                with self.lock:
                    if self.uart.read_port(LSR, 1, 0) & 0x20:
                        self.uart.write_port(DATA, 1, byte, 0)
                        break
                threading.Event().wait(0.001)

    def receive(self, count: int) -> bytes:
        received = bytearray()
        for _ in range(20000):
            with self.lock:
                while self.uart.read_port(LSR, 1, 0) & 1:
                    received.append(self.uart.read_port(DATA, 1, 0))
            if len(received) >= count:
                break
            threading.Event().wait(0.001)
        return bytes(received)


def all_of(fd: int, count: int) -> bytes:
    """So many bytes, in however many pieces they come."""
    got = b""
    while len(got) < count:
        part = os.read(fd, count - len(got))
        assert part
        got += part
    return got


def test_a_file_is_emptied_and_takes_what_is_sent(tmp_path: Path) -> None:
    path = tmp_path / "line"
    path.write_text("old")
    with Port(open_channel(str(path))) as port:
        port.send(b"new")
    assert path.read_bytes() == b"new"


def test_both_directions_of_descriptors() -> None:
    (ours_in, theirs_in), (theirs_out, ours_out) = os.pipe(), os.pipe()
    with Port(Descriptors(ours_in, ours_out, owned=True)) as port:
        os.write(theirs_in, bytes(range(200)))
        assert port.receive(200) == bytes(range(200))
        port.send(b"answer")
        assert all_of(theirs_out, 6) == b"answer"
        os.close(theirs_in)  # the end of the input is not the end of the line
        port.send(b"more")
        assert all_of(theirs_out, 4) == b"more"
    os.close(theirs_out)


def test_nothing_comes_in_while_stopped() -> None:
    ours, theirs = os.pipe()
    with Port(Descriptors(ours, None, owned=True)) as port:
        with port.lock:
            port.port.pause()
        os.write(theirs, b"early")
        threading.Event().wait(0.05)
        assert not port.uart.received
        with port.lock:
            port.port.resume()
        assert port.receive(5) == b"early"
    os.close(theirs)


def test_a_slow_reader_holds_the_guest_up_and_loses_nothing() -> None:
    theirs, ours = os.pipe()
    text = bytes(range(256)) * 1024  # more than the pipe and our buffer hold
    received = bytearray()
    with Port(Descriptors(None, ours, owned=True)) as port:
        sender = threading.Thread(target=port.send, args=(text,))
        sender.start()
        threading.Event().wait(0.1)
        while len(received) < len(text):
            received += os.read(theirs, 4096)
        sender.join(TIMEOUT_S)
    os.close(theirs)
    assert received == text


def test_who_never_reads_does_not_keep_the_board_from_ending() -> None:
    theirs, ours = os.pipe()
    os.set_blocking(ours, False)
    with Port(Descriptors(None, ours, owned=False)) as port:
        port.send(bytes(100_000))
    os.close(theirs)


def test_a_reader_that_goes_away_is_no_error() -> None:
    theirs, ours = os.pipe()
    os.close(theirs)
    with Port(Descriptors(None, ours, owned=True)) as port:
        port.send(bytes(200_000))


def test_unix_socket_one_client_after_the_other(tmp_path: Path) -> None:
    path = tmp_path / "line"
    line = UnixSocket(str(path))
    assert line.write(b"nobody hears this") == 17
    with Port(line) as port:
        assert path.stat().st_mode & 0o777 == 0o600
        for text in (b"first", b"second"):
            with socket.socket(socket.AF_UNIX) as client:
                client.connect(str(path))
                client.sendall(text)
                assert port.receive(len(text)) == text
                port.send(text.upper())
                assert all_of(client.fileno(), len(text)) == text.upper()
    assert not path.exists()


def test_a_socket_that_somebody_left_is_replaced(tmp_path: Path) -> None:
    path = tmp_path / "line"
    with socket.socket(socket.AF_UNIX) as left:
        left.bind(str(path))
    UnixSocket(str(path)).close()
    path.write_text("a file is not ours to remove")
    with pytest.raises(UsageError, match="is no socket"):
        UnixSocket(str(path))
    assert path.read_text()


def test_a_socket_that_somebody_listens_on_is_not_taken(tmp_path: Path) -> None:
    path = tmp_path / "line"
    first = UnixSocket(str(path))
    with pytest.raises(BusyError, match="somebody listens"):
        UnixSocket(str(path))
    with socket.socket(socket.AF_UNIX) as client:
        client.connect(str(path))
        first.read()
        assert first.output_fd() is not None
    first.close()
    assert not path.exists()
