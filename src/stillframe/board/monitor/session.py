"""One client's conversation with a QMP server, without its socket: negotiation, commands, replies.

Source: QEMU ``monitor/qmp.c``, ``docs/interop/qmp-spec.rst``.
"""

from __future__ import annotations

from typing import Literal

import msgspec

from stillframe.board.monitor.command_set import CommandContext, CommandTable, command_of
from stillframe.board.monitor.descriptors import ClientDescriptors
from stillframe.qmp.errors import QmpError

LINE_END = b"\r\n"


class Negotiation(msgspec.Struct, frozen=True):
    """Arguments of ``qmp_capabilities``."""

    enable: list[Literal["oob"]] = []


class Session:
    """One client's session. For the client's own thread.

    Args:
        commands: the commands the client may use once it has negotiated.
        fds: the descriptors it hands over.
    """

    def __init__(self, commands: CommandTable, fds: ClientDescriptors) -> None:
        self._commands = commands
        self._context = CommandContext(fds)
        self._negotiated = False
        self._before = CommandTable()
        self._before.add("qmp_capabilities", self._negotiate, arguments=Negotiation)

    @property
    def negotiated(self) -> bool:
        """Whether the client gets events and may use all commands."""
        return self._negotiated

    def answer(self, message: object) -> bytes:
        """Run a message (a JSON value, or the error in its place) and return the reply line.

        Never raises.
        """
        reply: dict[str, object]
        try:
            if isinstance(message, QmpError):
                raise message
            reply = {"return": self._run(message)}
        except QmpError as error:
            reply = {"error": {"class": error.error_class, "desc": error.description}}
        if isinstance(message, dict) and "id" in message:
            reply["id"] = message["id"]
        try:
            return msgspec.json.encode(reply) + LINE_END
        except (TypeError, ValueError, RecursionError):
            # The id is nested too deeply to encode, or the result is not JSON.
            return encode_error("the answer cannot be written as JSON")

    def _run(self, message: object) -> object:
        name, arguments = command_of(message)
        if self._negotiated:
            return self._commands.run(name, self._context, arguments)
        try:
            return self._before.run(name, self._context, arguments)
        except QmpError as error:
            if error.error_class != "CommandNotFound":
                raise
            raise QmpError(
                "Expecting capabilities negotiation with 'qmp_capabilities'", "CommandNotFound"
            ) from error

    def _negotiate(self, _context: CommandContext, arguments: Negotiation) -> None:
        if arguments.enable:
            raise QmpError(f"Capability {', '.join(arguments.enable)} not available")
        self._negotiated = True


def encode_error(description: str) -> bytes:
    """Return an error reply without an id."""
    error = {"class": "GenericError", "desc": description}
    return msgspec.json.encode({"error": error}) + LINE_END
