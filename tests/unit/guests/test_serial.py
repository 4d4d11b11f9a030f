"""The harness's side of the guest's serial line, against a socket of our own."""

from __future__ import annotations

import itertools
import socket
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest

from guests.serial import SerialConsole, parse_tick
from stillframe.errors import MachineError

LINE = (
    "tick n={n} t_ms={t} passes=1 pages={p} gap_us=5 gap_max_us=9 stop_us=0 stop_max_us=0"
    " stall_max_us=7 over_1ms=0 seconds={s}"
)


def line(n: int, seconds: int = 0) -> str:
    return LINE.format(n=n, t=n * 100, p=n * 500, s=seconds)


class FakeGuest:
    """The other end of the line."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.listener = socket.socket(socket.AF_UNIX)
        self.listener.bind(str(path))
        self.listener.listen()
        self.console = SerialConsole(path)
        self.link, _ = self.listener.accept()

    def print(self, *lines: str) -> None:
        self.link.sendall("".join(text + "\r\n" for text in lines).encode())

    def close(self) -> None:
        self.link.close()
        self.console.close()
        self.listener.close()


@pytest.fixture
def guest(tmp_path: Path) -> Iterator[FakeGuest]:
    fake = FakeGuest(tmp_path / "serial")
    yield fake
    fake.close()


def test_parse_tick() -> None:
    tick = parse_tick(line(3), 1.5)
    assert tick is not None
    assert (tick.n, tick.t_ms, tick.pages, tick.stall_max_us) == (3, 300, 1500, 7)
    assert tick.received_s == 1.5
    for text in ("", "ready pages=3", "tick", line(3)[:40], "tick n=x" + line(3)[8:]):
        assert parse_tick(text) is None


def test_ticks_after_a_mark(guest: FakeGuest) -> None:
    guest.print("[    0.1] kernel says something", line(1))
    guest.console.wait_line("n=1 ", timeout_s=60)
    mark = guest.console.mark()
    guest.print(line(2), line(3))
    guest.console.wait_line("n=3 ", timeout_s=60)
    assert [tick.n for tick in guest.console.ticks()] == [1, 2, 3]
    assert [tick.n for tick in guest.console.ticks(mark)] == [2, 3]
    assert guest.console.lines()[0] == "[    0.1] kernel says something"


def test_a_line_in_pieces_and_bad_bytes(guest: FakeGuest) -> None:
    guest.link.sendall(b"\xff\xfe\n" + line(1).encode()[:20])
    guest.link.sendall(line(1).encode()[20:] + b"\n")
    assert guest.console.wait_tick(since=0).n == 1


def test_a_command_waits_for_its_own_answer(guest: FakeGuest) -> None:
    def answer() -> None:
        assert guest.link.recv(100) == b"audit\n"
        guest.print(line(1), "audit ok pages=1")

    thread = threading.Thread(target=answer)
    thread.start()
    assert guest.console.command("audit", timeout_s=60) == "audit ok pages=1"
    thread.join()


def test_silence_and_a_closed_line_are_told_apart(guest: FakeGuest) -> None:
    with pytest.raises(MachineError, match=r"within 0.1 s; its last line was: nothing"):
        guest.console.wait_tick(0.1)
    assert not guest.console.is_progressing(0.1)
    guest.print("Kernel panic")
    guest.link.close()
    with pytest.raises(MachineError, match="was closed; its last line was: Kernel panic"):
        guest.console.wait_tick(5)
    assert guest.console.closed
    assert not guest.console.is_progressing(5)


def test_progress_is_two_new_ticks(guest: FakeGuest) -> None:
    guest.print(line(1), line(2))
    guest.console.wait_line("n=2 ", timeout_s=60)
    assert not guest.console.is_progressing(0.1)
    later = threading.Timer(0.05, guest.print, [line(3), line(4)])
    later.start()
    assert guest.console.is_progressing()
    later.join()


def test_a_stall_is_settled_after_two_changes_of_second(guest: FakeGuest) -> None:
    settled = threading.Event()

    def tick() -> None:
        for n in itertools.count(1):
            guest.print(line(n, seconds=n // 2))
            if settled.wait(0.02):
                return

    thread = threading.Thread(target=tick)
    thread.start()
    try:
        assert guest.console.settled_stall_us() == 9
    finally:
        settled.set()
        thread.join()
    guest.print("silence")
    guest.console.wait_line("^silence$", timeout_s=60)
    with pytest.raises(MachineError):
        guest.console.settled_stall_us(0.1)


def test_nobody_listens(tmp_path: Path) -> None:
    with pytest.raises(MachineError, match="cannot connect to the serial line"):
        SerialConsole(tmp_path / "none", timeout_s=0.1)
