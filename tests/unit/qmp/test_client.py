"""The QMP client against a server that does what a test wants."""

from __future__ import annotations

import gc
import json
import os
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from stillframe.errors import (
    BusyError,
    InternalError,
    MachineError,
    NotFoundError,
    StillframeError,
    UsageError,
)
from stillframe.qmp.client import QmpClient
from stillframe.qmp.command import QmpCommandError
from stillframe.qmp.events import QmpEvent
from tests.support.fake_qmp import GREETING, Answer, FakeQmp, SilenceError
from tests.support.waiting import wait_until

Start = Callable[..., tuple[FakeQmp, QmpClient]]


@pytest.fixture
def start(tmp_path: Path) -> Iterator[Start]:
    """Gives a fake server and a client connected to it."""
    made: list[Any] = []

    def make(answer: Answer | None = None, *, tcp: bool = False) -> tuple[FakeQmp, QmpClient]:
        server = FakeQmp(None if tcp else tmp_path / "qmp", answer)
        client = QmpClient.connect(server.address)
        made.extend((client, server))
        return server, client

    yield make
    for thing in made:
        thing.close()


def test_what_was_meant_for_the_client_before_is_passed_over(tmp_path: Path) -> None:
    greeting = json.dumps(GREETING).encode() + b"\r\n"
    stale = b'{"event": "STOP", "timestamp": {"seconds": 1, "microseconds": 2}}\r\n'
    server = FakeQmp(tmp_path / "qmp", greeting=stale + b'{"return": {}}\r\n' + greeting)
    try:
        with QmpClient.connect(str(tmp_path / "qmp")) as client:
            assert client.version[0] > 0
    finally:
        server.close()


def test_an_answer_to_the_client_before_is_not_ours(tmp_path: Path) -> None:
    stale = b'{"error": {"class": "GenericError", "desc": "JSON parse error"}}\r\n'
    greeting = json.dumps(GREETING).encode() + b"\r\n"
    server = FakeQmp(tmp_path / "qmp", greeting=greeting + stale)
    try:
        with QmpClient.connect(str(tmp_path / "qmp")) as client:
            assert client.execute("x") == {}
    finally:
        server.close()


def test_greeting_tells_the_version(start: Start) -> None:
    _server, client = start()
    assert client.version == (7, 2, 22)
    assert client.alive


def test_execute_passes_arguments_and_returns_the_reply(start: Start) -> None:
    server, client = start(lambda _server, command: {"got": command["arguments"]})
    assert client.execute("x", {"a": [1, "ü"]}) == {"got": {"a": [1, "ü"]}}
    assert server.commands[0]["execute"] == "x"


def test_a_command_without_arguments_has_none(start: Start) -> None:
    server, client = start()
    client.execute("stop")
    assert "arguments" not in server.commands[0]


def test_large_commands_and_replies_arrive_whole(start: Start) -> None:
    text = "x" * (3 << 20)
    _server, client = start(lambda _server, command: command["arguments"]["text"])
    assert client.execute("x", {"text": text}) == text


def test_answers_find_their_askers_in_any_order(start: Start) -> None:
    held: list[dict[str, Any]] = []

    def answer(server: FakeQmp, command: dict[str, Any]) -> object:
        held.append(command)
        if len(held) < 8:
            raise SilenceError
        for other in reversed(held):
            server.send({"return": other["arguments"]["n"], "id": other["id"]})
        raise SilenceError

    _server, client = start(answer)
    results: dict[int, object] = {}

    def ask(number: int) -> None:
        results[number] = client.execute("x", {"n": number}, timeout_s=60)

    threads = [threading.Thread(target=ask, args=(number,)) for number in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
    assert results == {number: number for number in range(8)}


def test_an_error_carries_class_and_description(start: Start) -> None:
    _server, client = start(
        lambda _server, _command: {"error": {"class": "GenericError", "desc": "no such thing"}}
    )
    with pytest.raises(QmpCommandError) as caught:
        client.execute("x")
    assert caught.value.error_class == "GenericError"
    assert caught.value.description == "no such thing"
    assert caught.value.exit_code == MachineError.exit_code
    assert "'x'" in str(caught.value)
    assert client.alive


def test_no_answer_is_an_error_and_a_late_one_is_dropped(start: Start) -> None:
    late: list[str] = []

    def answer(_server: FakeQmp, command: dict[str, Any]) -> object:
        if command["execute"] == "slow":
            late.append(command["id"])
            raise SilenceError
        return "quick"

    server, client = start(answer)
    before = time.monotonic()
    with pytest.raises(MachineError, match="did not answer 'slow'") as caught:
        client.execute("slow", timeout_s=0.1)
    assert time.monotonic() - before < 20, "as long as it may take without a limit"
    assert caught.value.guest_state == "unknown"
    wait_until(lambda: late)
    server.send({"return": "late", "id": late[0]})
    assert client.execute("x") == "quick"


def test_a_lost_connection_ends_waiting_at_once(start: Start) -> None:
    def answer(server: FakeQmp, _command: dict[str, Any]) -> object:
        server.hang_up()
        raise SilenceError

    _server, client = start(answer)
    before = time.monotonic()
    with pytest.raises(MachineError, match="lost the monitor") as caught:
        client.execute("x", timeout_s=60)
    assert time.monotonic() - before < 30
    assert caught.value.guest_state == "unknown"
    assert not client.alive
    with pytest.raises(MachineError, match="lost the monitor"):
        client.execute("y")


def test_a_closed_client_refuses(start: Start) -> None:
    _server, client = start()
    client.close()
    client.close()
    assert client.fileno() == -1
    with pytest.raises(MachineError):
        client.execute("x")


def test_close_ends_the_thread(start: Start) -> None:
    def qmp_threads() -> list[str]:
        return [thread.name for thread in threading.enumerate() if thread.name.startswith("qmp ")]

    before = len(qmp_threads())
    _server, client = start()
    assert len(qmp_threads()) > before
    client.close()
    assert len(qmp_threads()) <= before


def test_what_is_no_json_is_a_usage_error(start: Start) -> None:
    _server, client = start()
    with pytest.raises(UsageError):
        client.execute("x", {"a": object()})


def test_a_broken_server_is_a_lost_monitor(start: Start) -> None:
    def answer(server: FakeQmp, _command: dict[str, Any]) -> object:
        server.send(b"{this is no json\n")
        raise SilenceError

    _server, client = start(answer)
    with pytest.raises(MachineError):
        client.execute("x", timeout_s=60)


# Announced commands


def raw_bytes(server: FakeQmp) -> bytes:
    return b"".join(server.received)


def test_an_announced_command_is_only_completed(start: Start) -> None:
    server, client = start(lambda _server, command: command["execute"])
    client.announce("stop", {"a": 1})
    wait_until(lambda: raw_bytes(server).endswith(b'"arguments":{"a":1}'))
    assert server.commands == []
    assert client.execute("stop", {"a": 1}) == "stop"
    assert raw_bytes(server).count(b"stop") == 1
    assert b"\xff" not in raw_bytes(server)


@pytest.mark.parametrize("command", ["cont", "stop", "stopped"])
def test_another_command_discards_the_announced_one(start: Start, command: str) -> None:
    server, client = start(lambda _server, command: command["execute"])
    client.announce("stop", {"a": 1})
    assert client.execute(command) == command
    assert [sent["execute"] for sent in server.commands] == [command]
    assert client.execute("x") == "x"
    assert raw_bytes(server).count(b"\xff") == 1


def test_announcing_again_replaces(start: Start) -> None:
    server, client = start(lambda _server, command: command["execute"])
    client.announce("stop")
    client.announce("cont")
    assert client.execute("cont") == "cont"
    assert [sent["execute"] for sent in server.commands] == ["cont"]


def test_a_command_announces_the_next_one_behind_itself(start: Start) -> None:
    """QEMU reads it while the first one runs, if out-of-band commands were asked for."""
    server, client = start(lambda _server, command: command["execute"])
    assert b'"enable":["oob"]' in raw_bytes(server)
    assert client.execute("save", announce=("stop", {"a": 1})) == "save"
    wait_until(lambda: raw_bytes(server).endswith(b'"arguments":{"a":1}'))
    assert client.execute("stop", {"a": 1}) == "stop"
    assert raw_bytes(server).count(b"stop") == 1
    assert client.execute("save", announce=("stop", {"a": 1})) == "save"
    assert client.execute("cont") == "cont"
    assert [sent["execute"] for sent in server.commands] == ["save", "stop", "save", "cont"]


def test_announcing_on_a_lost_connection(start: Start) -> None:
    server, client = start()
    server.hang_up()
    wait_until(lambda: not client.alive)
    with pytest.raises(MachineError, match="lost the monitor"):
        client.announce("stop")


# Events


def test_events_come_in_order_with_times(start: Start) -> None:
    server, client = start()
    events: list[QmpEvent] = []
    client.subscribe(events.append)
    before = time.monotonic()
    server.event("STOP")
    server.event("RESET", guest=True)
    client.execute("x")
    assert [event.name for event in events] == ["STOP", "RESET"]
    assert events[1].data == {"guest": True}
    assert events[0].timestamp_s == 1700000000.25
    assert before <= events[0].received_s <= events[1].received_s <= time.monotonic()


def test_subscribers_hear_until_they_unsubscribe(start: Start) -> None:
    server, client = start()
    heard: list[str] = []
    stop = client.subscribe(lambda event: heard.append(event.name))
    server.event("A")
    wait_until(lambda: heard == ["A"])
    stop()
    stop()
    server.event("B")
    client.execute("x")
    assert heard == ["A"]


def test_a_failing_subscriber_harms_nobody(start: Start) -> None:
    server, client = start(lambda _server, _command: "fine")
    heard: list[str] = []

    def fail(_event: object) -> None:
        raise ValueError

    client.subscribe(fail)
    client.subscribe(lambda event: heard.append(event.name))
    server.event("A")
    wait_until(lambda: heard == ["A"])
    assert client.execute("x") == "fine"


def test_a_subscriber_may_not_run_commands(start: Start) -> None:
    server, client = start()
    caught: list[BaseException] = []

    def ask(_event: object) -> None:
        try:
            client.execute("x")
        except StillframeError as error:
            caught.append(error)

    client.subscribe(ask)
    server.event("A")
    wait_until(lambda: caught)
    assert isinstance(caught[0], InternalError)


# Descriptors


def test_a_descriptor_arrives_before_its_add_fd(start: Start) -> None:
    def answer(server: FakeQmp, _command: dict[str, Any]) -> object:
        return {"fdset-id": 3, "fd": len(server.fds)}

    server, client = start(answer)
    fd = os.memfd_create("x")
    try:
        added = client.add_fd(fd)
        assert (added.fdset_id, added.fd, added.path) == (3, 1, "/dev/fdset/3")
        assert os.fstat(server.fds[0]).st_ino == os.fstat(fd).st_ino
        client.remove_fd(added)
    finally:
        os.close(fd)
    assert server.commands[-1]["arguments"] == {"fdset-id": 3, "fd": 1}


def test_tcp_passes_no_descriptors(start: Start) -> None:
    _server, client = start(tcp=True)
    assert not client.passes_fds
    with pytest.raises(UsageError, match="not a unix socket"):
        client.send_fd(0)


def test_another_process_can_use_the_socket(start: Start) -> None:
    server, client = start()
    subprocess.run(
        [
            sys.executable,
            "-c",
            'import os, sys; os.write(int(sys.argv[1]), b\'{"execute": "cont", "id": 1}\\n\')',
            str(client.fileno()),
        ],
        pass_fds=[client.socket.fileno()],
        check=True,
    )
    wait_until(lambda: [command["execute"] for command in server.commands] == ["cont"])
    assert client.execute("x") == {}  # and the answer to a stranger's command does no harm


# Connecting


def test_no_socket(tmp_path: Path) -> None:
    with pytest.raises(NotFoundError, match="no QMP socket"):
        QmpClient.connect(str(tmp_path / "none"))


def test_a_socket_that_nobody_listens_on(tmp_path: Path) -> None:
    path = tmp_path / "stale"
    with socket.socket(socket.AF_UNIX) as stale:
        stale.bind(str(path))
    with pytest.raises(MachineError, match="nobody listens"):
        QmpClient.connect(str(path))


def test_no_such_host() -> None:
    with pytest.raises(NotFoundError, match="no host"):
        QmpClient.connect(("host.invalid", 4444))


@pytest.mark.parametrize("address", [("127.0.0.1", 99999), "nul\0byte"])
def test_a_senseless_address(address: Any) -> None:
    with pytest.raises(UsageError):
        QmpClient.connect(address)


def test_a_path_too_long_for_a_socket_address(tmp_path: Path, monkeypatch: Any) -> None:
    deep = tmp_path / ("d" * 90) / ("e" * 90)
    deep.mkdir(parents=True)
    monkeypatch.chdir(deep)
    server = FakeQmp(Path("qmp"))
    try:
        with QmpClient.connect(str(deep / "qmp")) as client:
            assert client.execute("x") == {}
    finally:
        server.close()


@pytest.mark.parametrize(
    "greeting",
    [b"QEMU 7.2.22 monitor - type 'help' for more information\n(qemu) ", b"{}\n", b"[1]\n"],
)
def test_what_is_not_qmp_is_said_so(tmp_path: Path, greeting: bytes) -> None:
    server = FakeQmp(tmp_path / "hmp", greeting=greeting)
    try:
        with pytest.raises(MachineError, match="does not speak QMP"):
            QmpClient.connect(server.address, timeout_s=60)
    finally:
        server.close()


def test_an_event_right_before_the_negotiation_is_answered(tmp_path: Path) -> None:
    class Eventful(FakeQmp):
        def _one(self, command: dict[str, Any]) -> None:
            if command["execute"] == "qmp_capabilities":
                self.event("NIC_RX_FILTER_CHANGED")
            super()._one(command)

    server = Eventful(tmp_path / "q")
    try:
        with QmpClient.connect(server.address, timeout_s=60) as client:
            assert client.execute("x") == {}
    finally:
        server.close()


def test_a_server_that_hangs_up(tmp_path: Path) -> None:
    path = str(tmp_path / "q")
    with socket.socket(socket.AF_UNIX) as listener:
        listener.bind(path)
        listener.listen(1)
        thread = threading.Thread(target=lambda: listener.accept()[0].close())
        thread.start()
        with pytest.raises(MachineError, match="hung up"):
            QmpClient.connect(path, timeout_s=60)
        thread.join()


def test_a_monitor_held_by_another_client_is_busy(tmp_path: Path) -> None:
    path = str(tmp_path / "q")
    with socket.socket(socket.AF_UNIX) as listener, socket.socket(socket.AF_UNIX) as holder:
        listener.bind(path)
        listener.listen(1)
        holder.connect(path)
        with listener.accept()[0]:
            before = time.monotonic()
            with pytest.raises(BusyError, match="in use by another client"):
                QmpClient.connect(path, timeout_s=0.3)
            assert time.monotonic() - before < 4.5, "five seconds without a limit"


def test_a_full_queue_is_waited_for(tmp_path: Path) -> None:
    path = str(tmp_path / "q")
    with socket.socket(socket.AF_UNIX) as listener:
        listener.bind(path)
        listener.listen(0)
        with socket.socket(socket.AF_UNIX) as first:
            first.connect(path)
            with pytest.raises(BusyError, match="is busy"):
                QmpClient.connect(path, timeout_s=0.2)
            timer = threading.Timer(0.1, lambda: listener.accept()[0].close())
            timer.start()
            with pytest.raises(BusyError, match="did not greet"):
                QmpClient.connect(path, timeout_s=5)
            timer.join()


def test_a_silent_monitor_is_not_called_held(tmp_path: Path) -> None:
    path = str(tmp_path / "q")
    with socket.socket(socket.AF_UNIX) as listener:
        listener.bind(path)
        listener.listen(1)
        with pytest.raises(BusyError, match="did not greet") as caught:
            QmpClient.connect(path, timeout_s=0.2)
        assert "main loop is stuck" in str(caught.value)


def test_failing_to_connect_leaves_nothing_behind(tmp_path: Path) -> None:
    gc.collect()  # else what other tests left may go meanwhile
    fds = len(os.listdir("/proc/self/fd"))
    threads = threading.active_count()
    path = str(tmp_path / "q")
    with socket.socket(socket.AF_UNIX) as listener:
        listener.bind(path)
        listener.listen(1)
        with pytest.raises(BusyError):
            QmpClient.connect(path, timeout_s=0.1)
    assert threading.active_count() <= threads
    assert len(os.listdir("/proc/self/fd")) <= fds


def test_the_client_is_light_to_import() -> None:
    code = "import sys, stillframe.qmp.client; print(*({'rich', 'click'} & set(sys.modules)))"
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True, env=os.environ
    )
    assert done.stdout.strip() == ""


def test_errors_print_nothing(tmp_path: Path) -> None:
    code = (
        "import sys\n"
        "from stillframe.qmp.client import QmpClient\n"
        "try:\n    QmpClient.connect(sys.argv[1], timeout_s=0.2)\n"
        "except Exception as error:\n    print(type(error).__name__)\n"
    )
    path = str(tmp_path / "q")
    with socket.socket(socket.AF_UNIX) as listener:
        listener.bind(path)
        listener.listen(1)
        done = subprocess.run(
            [sys.executable, "-c", code, path], capture_output=True, text=True, check=True
        )
    assert done.stdout.split() == ["BusyError"]
    assert done.stderr == ""
