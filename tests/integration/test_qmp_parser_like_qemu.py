"""The QMP server and a real QEMU get the same bytes: they answer commands alike, and recover from
garbage alike."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from stillframe.board.monitor.command_set import CommandTable
from stillframe.board.monitor.server import QmpServer
from tests.support.bare_vm import BareVm
from tests.support.raw_qmp import RawQmp

pytestmark = pytest.mark.qemu

COMMANDS = st.sampled_from(
    [
        b'{"execute":"query-name"}', b'{"execute":"query-name","id":[1,{"a":null}]}',
        b'{"execute":"nosuch"}', b'{"execute":"query-name","arguments":{"x":1}}',
        b'{"execute":5}', b'{"id":1}', b'{"execute":"query-name","arguments":[]}', b"[]", b"{}",
        b'"\\u00e9"', b"5 ", b"true ", b"\n", b"\r\n", b"  ", b'{ "id" : "\xc3\xa9" }',
        b'{"a":18446744073709551615}', b'[[["]}"]]]', b'{"id":"\\"","execute":"query-name"}',
    ]
)  # fmt: skip
GARBAGE = st.sampled_from(
    [
        b"{", b"}", b"[", b"]", b",", b":", b'"', b"\\", b"\n", b" ", b"\x01", b"\xff", b"0",
        b"-", b"e3", b"nul", b"@", b'"\\ud83d"', b'"\\q"', b"[" * 1025,
        b'{"execute":"query-name","id":',
        b"\xed\xa0\x80",
    ]
)  # fmt: skip


@pytest.fixture(scope="module")
def qemu() -> Iterator[RawQmp]:
    with BareVm("-machine", "q35", "-nodefaults", "-S") as vm, RawQmp(vm.qmp) as client:
        yield client


@pytest.fixture(scope="module")
def ours(tmp_path_factory: pytest.TempPathFactory) -> Iterator[RawQmp]:
    table = CommandTable()
    table.add("query-name", lambda _context, _given: {})
    server = QmpServer(table, version=(7, 2, 0))
    path: Path = tmp_path_factory.mktemp("qmp") / "qmp"
    server.listen(str(path))
    with RawQmp(path) as client:
        yield client
    server.close()


@settings(
    max_examples=200,
    deadline=None,
    suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow],
)
@given(st.lists(COMMANDS, max_size=12).map(b"".join))
def test_the_same_answers_to_commands(qemu: RawQmp, ours: RawQmp, data: bytes) -> None:
    assert comparable(ours.replies_to(data)) == comparable(qemu.replies_to(data))


@settings(
    max_examples=200,
    deadline=None,
    suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow],
)
@given(st.lists(GARBAGE | st.binary(min_size=1, max_size=3), max_size=25).map(b"".join))
def test_the_byte_ff_ends_any_garbage(qemu: RawQmp, ours: RawQmp, data: bytes) -> None:
    """``replies_to`` sends it, and waits for the answer to the command after it."""
    for client in (qemu, ours):
        assert client.replies_to(data)[-1]["error"]["desc"].startswith("JSON ")


def comparable(replies: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """What exactly is wrong with what is no JSON, each parser says in its own words."""
    for reply in replies:
        if reply.get("error", {}).get("desc", "").startswith("JSON parse error"):
            reply["error"]["desc"] = "JSON parse error"
    return replies
