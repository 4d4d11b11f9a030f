"""The QMP server's conversation with one client; clients among each other: test_server_clients."""

from __future__ import annotations

import json
import socket
import time
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from stillframe.board.monitor.command_set import CommandTable
from stillframe.qmp.client import QmpClient
from tests.support.raw_qmp import RawQmp
from tests.unit.board.monitor.conftest import Served

ECHO = {
    "file-name": "a", "count": 0, "small": 0, "large": 0, "ratio": None, "inner": [],
    "format": "ppm",
}  # fmt: skip


def test_the_greeting(served: Served) -> None:
    with RawQmp(served.address, negotiate=False) as client:
        assert client.greeting == {
            "QMP": {
                "version": {"qemu": {"major": 1, "minor": 2, "micro": 3}, "package": "test"},
                "capabilities": [],
            }
        }


def test_messages_are_lines_that_end_as_qemu_s(served: Served) -> None:
    with socket.socket(socket.AF_UNIX) as sock:
        sock.settimeout(60)
        sock.connect(served.address)
        sock.sendall(b'{"execute": "qmp_capabilities"}')
        received = b""
        while received.count(b"\r\n") < 2:
            received += sock.recv(4096)
        assert received.endswith(b'{"return":{}}\r\n')


def test_nothing_but_negotiation_is_answered_before_it(served: Served) -> None:
    with RawQmp(served.address, negotiate=False) as client:
        expecting = (
            "CommandNotFound", "Expecting capabilities negotiation with 'qmp_capabilities'",
        )  # fmt: skip
        assert client.error("count") == expecting
        assert client.error("nosuch") == expecting
        assert client.error("qmp_capabilities", {"enable": ["oob"]}) == (
            "GenericError", "Capability oob not available",
        )  # fmt: skip
        assert client.error("qmp_capabilities", {"enable": ["foo"]}) == (
            "GenericError", "Parameter 'null' does not accept value 'foo'",
        )  # fmt: skip
        assert client.error("count") == expecting
        assert served.ran == []
        assert client.execute("qmp_capabilities", {"enable": []}) == {}
        client.execute("count")
        assert len(served.ran) == 1
        assert client.error("qmp_capabilities") == (
            "CommandNotFound", "Capabilities negotiation is already complete, command ignored",
        )  # fmt: skip


def test_commands_and_version_are_told(served: Served) -> None:
    with RawQmp(served.address) as client:
        names = [command["name"] for command in client.execute("query-commands")]
        assert {"echo", "qmp_capabilities", "query-commands", "add-fd"} <= set(names)
        assert client.execute("query-version") == client.greeting["QMP"]["version"]


@pytest.mark.parametrize("command_id", [
    0, "x", None, [1, {"a": "é\0"}], {}, 1.5, True, 2**64 - 1, "￼ \U0001f600",
])  # fmt: skip
def test_ids_come_back(served: Served, command_id: object) -> None:
    with RawQmp(served.address) as client:
        for command in ("count", "nosuch"):
            message = {"execute": command, "id": command_id}
            assert client.ask(json.dumps(message).encode())["id"] == command_id
        assert "id" not in client.ask(b'{"execute": "count"}')


def test_an_id_too_deep_to_write_is_an_error(served: Served) -> None:
    with RawQmp(served.address) as client:
        reply = client.ask(b'{"execute": "count", "id": ' + b"[" * 1022 + b"]" * 1022 + b"}\n")
        assert reply["error"]["class"] == "GenericError"
        client.execute("count")


@pytest.mark.parametrize(("message", "description"), [
    (b"[]", "QMP input must be a JSON object"),
    (b'"x"', "QMP input must be a JSON object"),
    (b"5\n", "QMP input must be a JSON object"),
    (b"{}", "QMP input lacks member 'execute'"),
    (b'{"arguments": {}}', "QMP input lacks member 'execute'"),
    (b'{"execute": 5}', "QMP input member 'execute' must be a string"),
    (b'{"execute": "count", "arguments": []}', "QMP input member 'arguments' must be an object"),
    (b'{"execute": "count", "foo": 1}', "QMP input member 'foo' is unexpected"),
    (b'{"exec-oob": "count"}', "QMP input member 'exec-oob' is unexpected"),
    (b'{"execute": "count", "arguments": {"x": 1}}', "Parameter 'x' is unexpected"),
    (b"{]", "JSON parse error, JSON is malformed: object keys must be strings (byte 1)"),
])  # fmt: skip
def test_what_is_no_command(served: Served, message: bytes, description: str) -> None:
    with RawQmp(served.address) as client:
        reply = client.ask(message)
        assert reply == {"error": {"class": "GenericError", "desc": description}}
        client.execute("count")


@pytest.mark.parametrize(("arguments", "description"), [
    ({}, "Parameter 'file-name' is missing"),
    ({"file_name": "a"}, "Parameter 'file-name' is missing"),
    ({"file-name": 5}, "Invalid parameter type for 'file-name', expected: string"),
    ({"file-name": None}, "Invalid parameter type for 'file-name', expected: string"),
    ({"file-name": "a", "x": 1}, "Parameter 'x' is unexpected"),
    ({"file-name": "a", "count": 1.0}, "Invalid parameter type for 'count', expected: integer"),
    ({"file-name": "a", "count": True}, "Invalid parameter type for 'count', expected: integer"),
    ({"file-name": "a", "count": 2**63}, "Invalid parameter type for 'count', expected: integer"),
    ({"file-name": "a", "small": 256}, "Parameter 'small' expects uint8_t"),
    ({"file-name": "a", "small": -1}, "Parameter 'small' expects uint8_t"),
    ({"file-name": "a", "large": "x"}, "Parameter 'large' expects uint64"),
    ({"file-name": "a", "ratio": "x"}, "Invalid parameter type for 'ratio', expected: number"),
    ({"file-name": "a", "ratio": None}, "Invalid parameter type for 'ratio', expected: number"),
    ({"file-name": "a", "inner": {}}, "Invalid parameter type for 'inner', expected: array"),
    ({"file-name": "a", "inner": [7]}, "Invalid parameter type for 'inner[0]', expected: object"),
    ({"file-name": "a", "inner": [{"state": True}, {}]}, "Parameter 'inner[1].state' is missing"),
    ({"file-name": "a", "inner": [{"state": 1}]},
     "Invalid parameter type for 'inner[0].state', expected: boolean"),
    ({"file-name": "a", "inner": [{"state": True, "b": 1}]},
     "Parameter 'inner[0].b' is unexpected"),
    ({"file-name": "a", "inner": [{"state": True, "kind": "three"}]},
     "Parameter 'kind' does not accept value 'three'"),
    ({"file-name": "a", "format": "gif"}, "Parameter 'format' does not accept value 'gif'"),
    ({"file-name": "a", "format": 5}, "Invalid parameter type for 'format', expected: string"),
])  # fmt: skip
def test_wrong_arguments(served: Served, arguments: object, description: str) -> None:
    with RawQmp(served.address) as client:
        assert client.error("echo", arguments) == ("GenericError", description)


def test_arguments_of_every_kind(served: Served) -> None:
    with RawQmp(served.address) as client:
        assert client.execute("echo", {"file-name": "a"}) == ECHO
        given = {
            "file-name": "é\0", "count": -(2**63), "small": 255, "large": 2**64 - 1, "ratio": 2.0,
            "inner": [{"state": True, "kind": "two"}], "format": "png",
        }  # fmt: skip
        assert client.execute("echo", given) == given
        # As in QEMU, for old clients' sake.
        assert client.execute("echo", {"file-name": "", "large": -1})["large"] == 2**64 - 1


def test_how_commands_fail(served: Served, caplog: pytest.LogCaptureFixture) -> None:
    with RawQmp(served.address) as client:
        assert client.error("nosuch") == (
            "CommandNotFound", "The command nosuch has not been found",
        )  # fmt: skip
        assert client.error("fails") == ("DeviceNotFound", "no such thing")
        assert client.error("refuses") == ("GenericError", "it is broken: it fell down")
        assert client.error("crashes")[0] == "GenericError"
        assert "the command crashes failed" in caplog.text
        reply = client.ask(b'{"execute": "unwritable"}')
        assert reply["error"]["desc"] == "the answer cannot be written as JSON"
        client.execute("count")


def test_a_name_is_taken_once() -> None:
    table = CommandTable()
    table.add("a", lambda _context, _given: None)
    with pytest.raises(ValueError, match="a command a already"):
        table.add("a", lambda _context, _given: None)


def test_several_commands_in_one_packet_and_one_in_many(served: Served) -> None:
    with RawQmp(served.address) as client:
        client.send(b'{"execute": "count"}{"execute":"count", "id": 1} {"execute"')
        assert [client.receive(), client.receive()] == [{"return": {}}, {"return": {}, "id": 1}]
        for byte in b': "count"':
            client.send(bytes([byte]))
        assert len(served.ran) == 2
        assert client.ask(b"}") == {"return": {}}


def test_our_client_announces_commands(served: Served) -> None:
    with QmpClient.connect(served.address) as client:
        client.announce("count")
        assert client.execute("query-version") is not None
        assert served.ran == []
        client.announce("count")
        assert client.execute("count") == {}
        assert len(served.ran) == 1


def test_a_guard_ends_what_was_half_said(served: Served) -> None:
    """What snapshot/guard_process.py sends when its snapshotter died in the middle of a word."""
    with RawQmp(served.address) as client:
        client.send(b'{"execute": "fai')
        client.send(b'\xff\n{"execute": "count", "id": "guard"}\n')
        assert "JSON parse error" in client.receive()["error"]["desc"]
        assert client.receive() == {"return": {}, "id": "guard"}


def test_a_long_command_and_a_long_answer(served: Served) -> None:
    text = "x" * (5 << 20)
    with RawQmp(served.address) as client:
        assert client.execute("echo", {"file-name": text})["file-name"] == text


@settings(
    max_examples=150,
    deadline=None,
    suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow],
)
@given(
    st.lists(
        st.binary(max_size=64)
        | st.sampled_from([b'{"execute":', b'"count"', b"}", b"{", b"[", b"]", b'"', b"\\"])
        | st.sampled_from(
            [b'"qmp_capabilities"', b'"arguments":{', b'"id":', b"\n", b"\xff", b"1"]
        ),
        max_size=30,
    ),
    st.booleans(),
)
def test_whatever_comes_the_server_lives(
    served: Served, packets: list[bytes], negotiate: bool
) -> None:
    with RawQmp(served.address, negotiate=negotiate) as client:
        for packet in packets:
            client.send(packet)
        for reply in client.replies_to(b""):
            assert set(reply) <= {"return", "error", "id"}
    with RawQmp(served.address) as client:
        assert client.execute("query-version")


def test_a_hostile_megabyte_is_answered_and_the_next_client_served(served: Served) -> None:
    for hostile in (b"[" * (1 << 18), b'{"a":' * 3000, b"\xff" * 3000, b'"' + b"a" * (1 << 20)):
        with RawQmp(served.address) as client:
            began = time.monotonic()
            assert client.replies_to(hostile)
            assert time.monotonic() - began < 30
            client.execute("count")


def test_over_tcp_it_is_the_same(tmp_path: Path) -> None:
    served = Served(str(tmp_path / "qmp"))
    try:
        address = served.server.listen(("127.0.0.1", 0))
        assert isinstance(address, tuple)
        with RawQmp(address) as client, QmpClient.connect(address) as other:
            assert client.execute("echo", {"file-name": "a"}) == ECHO
            assert client.error("getfd", {"fdname": "x"})[1].startswith("No file descriptor")
            other.execute("count")
    finally:
        served.server.close()
