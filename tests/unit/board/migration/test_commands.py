"""The QMP commands of migration, as a client sees them; wording taken from QEMU 7.2."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import pytest

from stillframe.board.migration.commands import add_migration_commands
from stillframe.board.migration.engine import Migration
from stillframe.board.monitor.command_set import CommandContext, CommandTable
from stillframe.board.monitor.descriptors import ClientDescriptors, FdSets
from stillframe.qmp.errors import QmpError
from tests.unit.board.migration.toy_board import ToyBoard


class Client:
    """Runs commands on one machine."""

    def __init__(self, stack: ExitStack) -> None:
        self.board = ToyBoard()
        stack.callback(self.board.close)
        self.migration = Migration(self.board)  # type: ignore[arg-type]
        stack.callback(self.migration.close)
        self._table = CommandTable(self.board.lock)
        add_migration_commands(self._table, self.migration)
        self._context = CommandContext(ClientDescriptors(FdSets()))

    def ask(self, command: str, **arguments: object) -> Any:
        return self._table.run(command, self._context, arguments)

    def refusal(self, command: str, **arguments: object) -> str:
        with pytest.raises(QmpError) as caught:
            self.ask(command, **arguments)
        assert caught.value.error_class == "GenericError"
        return caught.value.description


@pytest.fixture
def client() -> Iterator[Client]:
    with ExitStack() as stack:
        yield Client(stack)


def capability(name: str, state: bool = True) -> dict[str, object]:
    return {"capabilities": [{"capability": name, "state": state}]}


def test_before_any_migration(client: Client) -> None:
    assert client.ask("query-migrate") == {}
    assert {"capability": "events", "state": False} in client.ask("query-migrate-capabilities")
    assert client.ask("query-migrate-parameters")["downtime-limit"] == 300
    assert client.ask("migrate_cancel") == {}


def test_options(client: Client) -> None:
    assert client.ask("migrate-set-capabilities", **capability("events")) == {}
    assert {"capability": "events", "state": True} in client.ask("query-migrate-capabilities")
    assert client.ask("migrate-set-parameters", **{"max-bandwidth": 5}) == {}
    assert client.ask("migrate-set-parameters") == {}
    assert client.ask("query-migrate-parameters")["max-bandwidth"] == 5


@pytest.mark.parametrize(
    ("command", "arguments", "text"),
    [
        ("migrate", {}, "Parameter 'uri' is missing"),
        ("migrate", {"uri": 1}, "Invalid parameter type for 'uri', expected: string"),
        ("migrate", {"uri": "bla:x"}, "unknown migration protocol: bla:x"),
        ("migrate", {"uri": "fd:nope"}, "File descriptor named 'nope' has not been found"),
        ("migrate", {"uri": "tcp:127.0.0.1"}, "error parsing address '127.0.0.1'"),
        (
            "migrate-start-postcopy",
            {},
            "Enable postcopy with migrate_set_capability before the start of migration",
        ),
        (
            "migrate-incoming",
            {"uri": "tcp:127.0.0.1:1"},
            "'-incoming' was not specified on the command line",
        ),
        (
            "migrate-set-capabilities",
            capability("nonsense"),
            "Parameter 'capability' does not accept value 'nonsense'",
        ),
        ("migrate-set-capabilities", {}, "Parameter 'capabilities' is missing"),
        (
            "migrate-set-capabilities",
            {"capabilities": "x"},
            "Invalid parameter type for 'capabilities', expected: array",
        ),
        (
            "migrate-set-parameters",
            {"downtime-limit": 3000000},
            "Parameter 'downtime_limit' expects an integer in the range of 0 to (2000 * 1000) ms",
        ),
        (
            "migrate-set-parameters",
            {"downtime-limit": -1},
            "Parameter 'downtime_limit' expects an integer in the range of 0 to (2000 * 1000) ms",
        ),
        (
            "migrate-set-parameters",
            {"max-bandwidth": "x"},
            "Parameter 'max-bandwidth' expects uint64",
        ),
        ("migrate-set-parameters", {"nope": 1}, "Parameter 'nope' is unexpected"),
    ],
)
def test_refusals(client: Client, command: str, arguments: dict[str, object], text: str) -> None:
    assert client.refusal(command, **arguments) == text


def test_a_migration_over_qmp(client: Client, tmp_path: Path) -> None:
    client.board.power_on()
    client.ask("migrate-set-parameters", **{"max-bandwidth": 1 << 20, "downtime-limit": 0})
    assert client.ask("migrate", uri=f"file:{tmp_path}/a", detach=True) == {}
    assert client.refusal("migrate", uri=f"file:{tmp_path}/b") == (
        "There's a migration process in progress"
    )
    assert client.refusal("migrate-set-capabilities", **capability("events")) == (
        "There's a migration process in progress"
    )
    info = client.ask("query-migrate")
    assert info["status"] in ("setup", "active")
    client.ask("migrate_cancel")
    assert client.migration.wait(60)
    assert client.ask("query-migrate")["status"] == "cancelled"
    client.ask("migrate-set-parameters", **{"max-bandwidth": 0, "downtime-limit": 300})
    client.ask("migrate", uri=f"file:{tmp_path}/a")
    assert client.migration.wait(60)
    info = client.ask("query-migrate")
    assert info["status"] == "completed"
    assert {"total-time", "setup-time", "downtime", "ram"} <= set(info)
    assert client.refusal("migrate", uri=f"file:{tmp_path}/a") == (
        "Can't migrate the vm that was paused due to previous migration"
    )
