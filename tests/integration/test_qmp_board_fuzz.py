"""Commands of a board with any arguments: each is answered, and the guest runs on."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from tests.support.qmp_machines import board_monitor, make_disk
from tests.support.raw_qmp import RawQmp

# Not quit, which ends it; nor migrate-incoming and migrate to where somebody might be.
COMMANDS = """
add-fd closefd cont device_add getfd human-monitor-command migrate migrate-set-capabilities
migrate-set-parameters migrate-start-postcopy migrate_cancel object-add object-del pmemsave
qmp_capabilities qom-get qom-list query-block query-commands query-cpus-fast query-fdsets query-jobs
query-kvm query-machines query-memdev query-memory-devices query-memory-size-summary query-migrate
query-migrate-capabilities query-migrate-parameters query-name query-status query-target query-uuid
query-version remove-fd screendump stop system_powerdown system_reset x-query-ramblock
xen-save-devices-state
"""
NUMBERS = st.sampled_from([0, 1, -1, 4096, 4097, 2**20, 2**63 - 1, 2**63, 2**64, 2**70, 1.5, 1e300])
WORDS = st.sampled_from([
    "", "x", "m0", "d0", "memory-backend-ram", "pc-dimm", "/machine", "/", "type", "png", "events",
    "background-snapshot", "postcopy-ram", "info ramblock", "info mtree -f", "gpa2hva 0", "a\0b",
    "/dev/fdset/0", "/dev/fdset/x", "/dev/null", "/dev/full", "/nosuch/x", "fd:x", "é", "-1",
])  # fmt: skip
VALUES = st.recursive(
    NUMBERS | WORDS | st.booleans() | st.none(),
    lambda inner: (
        st.lists(inner, max_size=2)
        | st.dictionaries(st.sampled_from(["capability", "state", "x"]), inner, max_size=3)
    ),
    max_leaves=4,
)
OTHER_MEMBERS = """
val live format device head fdset-id fd opaque fdname path property command-line cpu-index qom-type
id driver memdev enable capabilities max-bandwidth downtime-limit x
"""
SIZED = st.sampled_from([0, 1, -1, 4096, 2**20, 2**63, 1.5, None, "x"])
ARGUMENTS = st.fixed_dictionaries(
    {},
    optional={
        # No file of ours is made by any of these.
        "filename": st.sampled_from(
            ["/dev/null", "/dev/full", "/dev/fdset/0", "/nosuch/x", "a\0b", "", 5, None]
        ),
        "uri": st.sampled_from(["fd:x", "fd:", "file:/nosuch/x", "tcp:", "unix:", "x", "", 5]),
        "size": SIZED,
    }
    | dict.fromkeys(OTHER_MEMBERS.split(), VALUES),
)


@pytest.fixture(scope="module")
def board(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    directory: Path = tmp_path_factory.mktemp("board")
    with board_monitor(directory, make_disk(directory)) as path:
        with RawQmp(path) as client:
            client.execute("cont")
        yield path


def test_all_commands_are_tried(board: str) -> None:
    with RawQmp(board) as client:
        names = {command["name"] for command in client.execute("query-commands")}
    assert names - set(COMMANDS.split()) == {"quit", "migrate-incoming"}


@settings(
    max_examples=150,
    deadline=None,
    suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow],
)
@given(st.lists(st.tuples(st.sampled_from(COMMANDS.split()), ARGUMENTS), max_size=12))
def test_any_arguments(board: str, commands: list[tuple[str, dict[str, object]]]) -> None:
    with RawQmp(board) as client:
        for name, arguments in commands:
            reply = client.command(name, arguments)
            if "error" in reply:
                assert reply["error"]["class"] in ("GenericError", "CommandNotFound",
                                                   "DeviceNotFound")  # fmt: skip
                assert "internal error" not in reply["error"]["desc"], (name, arguments)
        client.execute("cont")
        assert client.execute("query-status")["status"] == "running"


@settings(
    max_examples=150,
    deadline=None,
    suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow],
)
@given(st.sampled_from(COMMANDS.split()), st.data())
def test_few_arguments(board: str, name: str, data: st.DataObject) -> None:
    """Fewer of them, so that more are right."""
    arguments = data.draw(ARGUMENTS)
    with RawQmp(board) as client:
        known = {}
        for member, value in arguments.items():
            reply = client.command(name, {member: value})
            description = reply.get("error", {}).get("desc", "")
            assert "internal error" not in description, (name, member, value)
            if "unexpected" not in description:
                known[member] = value
        reply = client.command(name, known)
        assert "internal error" not in reply.get("error", {}).get("desc", ""), (name, known)
        client.execute("cont")
        assert client.execute("query-status")["status"] == "running"
