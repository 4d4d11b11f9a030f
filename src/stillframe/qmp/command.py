"""One QMP command: its wire format, and the error that may answer it."""

from __future__ import annotations

from collections.abc import Mapping

import msgspec

from stillframe.errors import MachineError, UsageError

Command = tuple[str, Mapping[str, object]]
"""A QMP command and its arguments."""


class QmpCommandError(MachineError):
    """The VMM answered a command with an error, which leaves the guest as it was; ``guest_state``
    is ``unknown``, as the client does not know that state.

    ``command``: the command's name. ``error_class``: QMP's class, usually ``GenericError``.
    ``description``: the VMM's own words.
    """

    def __init__(self, command: str, error_class: str, description: str) -> None:
        super().__init__(f"the VM refused '{command}'", why=description, guest_state="unknown")
        self.command = command
        self.error_class = error_class
        self.description = description


def command_body(command: str, arguments: Mapping[str, object] | None) -> bytes:
    """Encode a command as JSON, without its id and closing brace.

    Raises:
        UsageError: the arguments cannot be written as JSON.
    """
    message: dict[str, object] = {"execute": command}
    if arguments is not None:
        message["arguments"] = arguments
    try:
        return msgspec.json.encode(message)[:-1]
    except (TypeError, ValueError, RecursionError) as error:
        raise UsageError(f"cannot send '{command}'", why=str(error)) from error
