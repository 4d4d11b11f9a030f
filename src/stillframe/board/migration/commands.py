"""The QMP commands for migration."""

from __future__ import annotations

import msgspec
from msgspec import UNSET, UnsetType

from stillframe.board.migration.engine import Migration
from stillframe.board.monitor.arguments import Uint64
from stillframe.board.monitor.command_set import CommandContext, CommandTable, NoArguments


class CapabilityState(msgspec.Struct, frozen=True):
    """One element of the list that migrate-set-capabilities takes."""

    capability: str
    state: bool


class SetCapabilities(msgspec.Struct, frozen=True):
    """Arguments of migrate-set-capabilities."""

    capabilities: list[CapabilityState]


class SetParameters(msgspec.Struct, frozen=True, rename="kebab"):
    """Arguments of migrate-set-parameters that the board supports."""

    max_bandwidth: Uint64 | UnsetType = UNSET
    avail_switchover_bandwidth: Uint64 | UnsetType = UNSET
    downtime_limit: Uint64 | UnsetType = UNSET
    max_postcopy_bandwidth: Uint64 | UnsetType = UNSET


class Uri(msgspec.Struct, frozen=True):
    """Arguments of migrate; ``detach`` is accepted and ignored."""

    uri: str
    detach: bool | UnsetType = UNSET


class IncomingUri(msgspec.Struct, frozen=True):
    """Arguments of migrate-incoming."""

    uri: str


def add_migration_commands(table: CommandTable, migration: Migration) -> None:
    """Add the commands to the server's table. Each takes the locks that it needs."""

    def query_capabilities(context: CommandContext, arguments: NoArguments) -> object:
        return [
            {"capability": name, "state": state} for name, state in migration.capabilities.items()
        ]

    def set_capabilities(context: CommandContext, arguments: SetCapabilities) -> None:
        migration.set_capabilities({one.capability: one.state for one in arguments.capabilities})

    def set_parameters(context: CommandContext, arguments: SetParameters) -> None:
        migration.parameters.set(msgspec.to_builtins(arguments))

    add = table.add
    add("query-migrate", lambda context, arguments: migration.query(), locked=False)
    add("query-migrate-capabilities", query_capabilities, locked=False)
    add("migrate-set-capabilities", set_capabilities, arguments=SetCapabilities, locked=False)
    add(
        "query-migrate-parameters",
        lambda context, arguments: migration.parameters.as_dict(),
        locked=False,
    )
    add("migrate-set-parameters", set_parameters, arguments=SetParameters, locked=False)
    add(
        "migrate",
        lambda context, arguments: migration.migrate(arguments.uri, fds=context.fds),
        arguments=Uri,
        locked=False,
    )
    add("migrate_cancel", lambda context, arguments: migration.cancel(), locked=False)
    add(
        "migrate-start-postcopy",
        lambda context, arguments: migration.start_postcopy(),
        locked=False,
    )
    add(
        "migrate-incoming",
        lambda context, arguments: migration.incoming(arguments.uri, fds=context.fds),
        arguments=IncomingUri,
        locked=False,
    )
