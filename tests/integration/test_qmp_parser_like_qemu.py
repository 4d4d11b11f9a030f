"""The QMP server and a real QEMU get the same bytes, sensible or not, and answer the same."""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from stillframe.qmp.commands import CommandTable
from stillframe.qmp.server import QmpServer
from tests.support.bare_vm import BareVm
from tests.support.raw_qmp import RawQmp

pytestmark = pytest.mark.qemu

_SHOWN = 60
"""How much of an error about stray bytes is compared: we show less of them than QEMU."""

PIECES = st.sampled_from(
    [
        b"{", b"}", b"[", b"]", b",", b":", b'"', b"'", b"\\", b"\n", b" ", b"\t", b"\r", b"\x01",
        b"\xff", b"\xfe", b"\xc3\xa9", b"0", b"1", b"-", b".5", b"1.5", b"e3", b"1e", b"true",
        b"null", b"nul", b'"a"', b'"id"', b'"execute"', b'"arguments"', b"%", b"@", b"A",
        b'"\\u00e9"', b'"\\ud83d"', b'"\\q"', b'"\\u12"', b"'it\\'s'", b'{"a":1,"a":2}',
        b'{"execute":"query-name"}', b'{"execute":"query-name","id":', b'{"execute":"nosuch"}',
        b'{"execute":"query-name","arguments":{"x":1}}', b'{"execute":5}', b'{"id":1}',
        b'{"execute":"query-name","arguments":[]}', b"[" * 1025, b"18446744073709551616",
        b'{"execute":"getfd","arguments":{"fdname":', b'{"execute":"add-fd","arguments":{',
        b'"fdset-id":', b"\xed\xa0\x80",
        b"1.0", b"-1", b'"x"',
    ]
)  # fmt: skip
BYTES = st.lists(PIECES | st.binary(min_size=1, max_size=3), max_size=25).map(b"".join)


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


def comparable(reply: dict[str, Any]) -> object:
    if "error" in reply and reply["error"]["desc"].startswith("JSON parse error, stray"):
        # A C string ends at a NUL; and how much of what is no UTF-8 one replacement stands for is
        # anybody's choice.
        shown = re.sub("\ufffd+", "\ufffd", reply["error"]["desc"].replace("\0", ""))
        reply["error"]["desc"] = shown[:_SHOWN]
    return reply


@settings(
    max_examples=400, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
@given(BYTES)
def test_the_same_answers_to_whatever_comes(qemu: RawQmp, ours: RawQmp, data: bytes) -> None:
    theirs = [comparable(reply) for reply in qemu.replies_to(data)]
    assert [comparable(reply) for reply in ours.replies_to(data)] == theirs
