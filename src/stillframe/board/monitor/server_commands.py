"""The commands that every QMP server has (QEMU ``qapi/control.json``, ``misc.json``)."""

from __future__ import annotations

import os

import msgspec

from stillframe.board.monitor.command_set import CommandContext, CommandTable
from stillframe.board.monitor.session import Negotiation
from stillframe.qmp.errors import QmpError


class AddFd(msgspec.Struct, frozen=True, rename="kebab"):
    """Arguments of ``add-fd``."""

    fdset_id: int | None = None
    opaque: str | None = None


class RemoveFd(msgspec.Struct, frozen=True, rename="kebab"):
    """Arguments of ``remove-fd``."""

    fdset_id: int
    fd: int | None = None


class NamedFd(msgspec.Struct, frozen=True):
    """Arguments of ``getfd`` and ``closefd``."""

    fdname: str


def add_server_commands(commands: CommandTable, version: dict[str, object]) -> None:
    """Add the commands to the table.

    Args:
        version: the answer to ``query-version``.
    """
    commands.add("qmp_capabilities", _negotiated_already, arguments=Negotiation, locked=False)
    commands.add("query-version", lambda _context, _arguments: version, locked=False)
    commands.add(
        "query-commands",
        lambda _context, _arguments: [{"name": name} for name in commands.names()],
        locked=False,
    )
    commands.add("add-fd", _add_fd, arguments=AddFd, locked=False)
    commands.add("remove-fd", _remove_fd, arguments=RemoveFd, locked=False)
    commands.add("query-fdsets", _query_fdsets, locked=False)
    commands.add(
        "getfd",
        lambda context, named: context.fds.keep(named.fdname),
        arguments=NamedFd,
        locked=False,
    )
    commands.add(
        "closefd", lambda context, named: context.fds.close_named(named.fdname), arguments=NamedFd,
        locked=False,
    )  # fmt: skip


def _negotiated_already(_context: CommandContext, _arguments: Negotiation) -> None:
    raise QmpError(
        "Capabilities negotiation is already complete, command ignored", "CommandNotFound"
    )


def _add_fd(context: CommandContext, arguments: AddFd) -> object:
    fd = context.take_fd()
    try:
        fdset_id = context.fds.sets.add(fd, arguments.fdset_id, arguments.opaque)
    except QmpError:
        os.close(fd)
        raise
    return {"fdset-id": fdset_id, "fd": fd}


def _remove_fd(context: CommandContext, arguments: RemoveFd) -> None:
    context.fds.sets.remove(arguments.fdset_id, arguments.fd)


def _query_fdsets(context: CommandContext, _arguments: object) -> object:
    return [
        {
            "fdset-id": fdset_id,
            "fds": [
                {"fd": member.fd} | ({} if member.opaque is None else {"opaque": member.opaque})
                for member in members
            ],
        }
        for fdset_id, members in context.fds.sets.listed()
    ]
