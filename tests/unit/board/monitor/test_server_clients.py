"""Several clients of one QMP server: nobody waits for another, and nobody can end the server."""

from __future__ import annotations

import contextlib
import gc
import os
import select
import socket
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from stillframe.board.monitor.command_set import CommandTable
from stillframe.board.monitor.server import QmpServer
from tests.support.raw_qmp import RawQmp
from tests.support.waiting import wait_until
from tests.unit.board.monitor.conftest import Served

WAIT_S = 20.0
NAMES = ("STOP", "RESUME", "RESET", "POWERDOWN")


def open_fds() -> int:
    return len(os.listdir("/proc/self/fd"))


@pytest.fixture
def quick_switches() -> Iterator[None]:
    """Threads take turns as often as can be."""
    usual_s = sys.getswitchinterval()
    sys.setswitchinterval(1e-6)
    yield
    sys.setswitchinterval(usual_s)


def test_a_command_that_takes_long_holds_up_its_own_client_only(served: Served) -> None:
    with RawQmp(served.address) as slow, RawQmp(served.address) as other:
        slow.send(b'{"execute": "gate", "id": 1}{"execute": "count", "id": 2}')
        assert served.gate.entered.wait(WAIT_S)
        other.execute("count")
        assert len(served.ran) == 1
        served.gate.leave.set()
        assert [slow.receive()["id"], slow.receive()["id"]] == [1, 2]


def test_commands_run_under_the_lock_but_those_that_say_no(served: Served) -> None:
    with RawQmp(served.address) as holder, RawQmp(served.address) as other:
        holder.send(b'{"execute": "locked-gate"}')
        assert served.gate.entered.wait(WAIT_S)
        other.execute("unlocked")
        other.execute("query-version")
        other.send(b'{"execute": "count"}')
        assert not select.select([other.socket], [], [], 0.2)[0]
        assert served.ran == []
        served.gate.leave.set()
        assert other.receive() == {"return": {}}


def test_events_go_to_all_who_have_negotiated_in_one_order(
    served: Served, quick_switches: None
) -> None:
    before_s = time.time()
    clients = [RawQmp(served.address) for _ in range(3)]
    silent = RawQmp(served.address, negotiate=False)
    emitters = [
        threading.Thread(
            target=lambda name=name: [served.server.emit(name, {"n": n}) for n in range(150)]
        )
        for name in NAMES
    ]
    for thread in emitters:
        thread.start()
    for thread in emitters:
        thread.join()
    served.server.emit("SHUTDOWN")
    heard = [[client.receive() for _ in range(601)] for client in clients]
    assert heard[0] == heard[1] == heard[2]
    for name in NAMES:
        assert [e["data"]["n"] for e in heard[0] if e["event"] == name] == list(range(150))
    last = heard[0][-1]
    assert set(last) == {"event", "timestamp"}
    stamps = [e["timestamp"]["seconds"] + e["timestamp"]["microseconds"] / 1e6 for e in heard[0]]
    assert before_s - 1 <= stamps[0] <= stamps[-1] <= time.time() + 1
    assert stamps == sorted(stamps)
    assert silent.execute("qmp_capabilities") == {}  # and no event before it
    for client in (*clients, silent):
        client.close()


def test_an_event_that_a_command_brings_about_comes_before_its_answer(served: Served) -> None:
    served.table.add("stop", lambda _context, _given: served.server.emit("STOP"))
    with RawQmp(served.address) as client:
        client.send(b'{"execute": "stop"}')
        assert client.receive()["event"] == "STOP"
        assert client.receive() == {"return": {}}


def test_who_never_reads_is_dropped_and_the_others_go_on(served: Served) -> None:
    with RawQmp(served.address) as sleeper, RawQmp(served.address) as other:
        told = 0
        began = time.monotonic()
        longest_s = 0.0
        while told < 400:
            started = time.monotonic()
            served.server.emit("STOP", {"filler": "x" * (32 << 10)})
            longest_s = max(longest_s, time.monotonic() - started)
            told += 1
            assert other.receive()["event"] == "STOP"
        assert longest_s < 20
        assert time.monotonic() - began < 120
        other.execute("count")
        # What the kernel and the server kept for it, and then the end.
        heard = 0
        with contextlib.suppress(EOFError, ConnectionError):
            while sleeper.receive()["event"] == "STOP":
                heard += 1
        assert heard < told


def test_who_reads_no_answers_gets_no_more_of_them_until_it_does(served: Served) -> None:
    with RawQmp(served.address) as greedy, RawQmp(served.address) as other:
        asked = 0
        greedy.socket.setblocking(False)
        with contextlib.suppress(BlockingIOError):
            while asked < 100_000:
                greedy.socket.sendall(b'{"execute": "large", "id": %d}' % asked)
                asked += 1
        assert 0 < asked < 100_000
        # The last one may be half out; the ones before it are answered once they are read.
        other.execute("count")
        ran = -1
        while ran != len(served.ran):
            ran = len(served.ran)
            time.sleep(0.1)
        # What the sockets' buffers and the server keep is far less than what was asked for.
        assert ran < 50
        greedy.socket.settimeout(WAIT_S)
        for number in range(asked):
            assert greedy.receive()["id"] == number


@pytest.mark.parametrize("last_words", [b"", b'{"execute": "gate"}', b'{"execute": "cou', b"\xff"])
def test_a_client_may_go_at_any_time(served: Served, last_words: bytes) -> None:
    fds = open_fds()
    for _ in range(20):
        client = RawQmp(served.address)
        client.send(last_words)
        client.close()
        served.server.emit("STOP")
    served.gate.leave.set()
    with RawQmp(served.address) as other:
        other.execute("count")
    wait_until(lambda: open_fds() <= fds)


def test_a_client_that_resets_its_connection(tmp_path: Path) -> None:
    served = Served(str(tmp_path / "qmp"))
    try:
        address = served.server.listen(("127.0.0.1", 0))
        for _ in range(10):
            client = RawQmp(address)
            client.socket.setsockopt(
                socket.SOL_SOCKET, socket.SO_LINGER, b"\1\0\0\0\0\0\0\0"
            )  # reset instead of a proper end
            client.send(b'{"execute": "large"}' * 50)
            client.close()
        with RawQmp(address) as other:
            other.execute("count")
    finally:
        served.server.close()


def test_what_was_asked_before_hanging_up_is_answered(served: Served) -> None:
    with RawQmp(served.address) as client:
        client.send(b'{"execute": "large", "id": 1}' * 20)
        client.socket.shutdown(socket.SHUT_WR)
        for _ in range(20):
            assert client.receive()["id"] == 1
        with pytest.raises(EOFError):
            client.receive()


def test_more_clients_than_are_served_wait_for_their_turn(served: Served) -> None:
    clients = [RawQmp(served.address) for _ in range(32)]
    waiting = socket.socket(socket.AF_UNIX)
    waiting.settimeout(WAIT_S)
    waiting.connect(served.address)
    assert not select.select([waiting], [], [], 0.2)[0]
    clients.pop().close()
    assert b"QMP" in waiting.recv(4096)
    waiting.close()
    for client in clients:
        client.close()


def test_closing_says_what_there_is_to_say_and_leaves_nothing(tmp_path: Path) -> None:
    gc.collect()  # else what other tests left may go meanwhile
    fds, threads = open_fds(), threading.active_count()
    served = Served(str(tmp_path / "qmp"))
    clients = [RawQmp(served.address) for _ in range(3)]
    served.server.emit("SHUTDOWN")
    served.server.close()
    served.server.close()
    for client in clients:
        assert client.receive()["event"] == "SHUTDOWN"
        with pytest.raises((EOFError, ConnectionError)):
            client.receive()
        client.close()
    assert not (tmp_path / "qmp").exists()
    assert open_fds() <= fds
    assert threading.active_count() <= threads


def test_a_command_may_close_the_server_and_is_answered(tmp_path: Path) -> None:
    served = Served(str(tmp_path / "qmp"))
    served.table.add("quit", lambda _context, _given: served.server.close(), locked=False)
    with RawQmp(served.address) as client, RawQmp(served.address) as other:
        assert client.execute("quit") == {}
        with pytest.raises(EOFError):
            client.receive()
        with pytest.raises(EOFError):
            other.receive()


def test_closing_does_not_wait_long_for_a_command(served: Served) -> None:
    with RawQmp(served.address) as client:
        client.send(b'{"execute": "gate"}')
        assert served.gate.entered.wait(WAIT_S)
        began = time.monotonic()
        served.server.close()
        assert time.monotonic() - began < 10


def test_no_listener_no_client() -> None:
    server = QmpServer(CommandTable(), version=(1, 0, 0))
    server.emit("STOP")
    server.close()
