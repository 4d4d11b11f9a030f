"""A QMP server's command table, and the dispatch of messages.

The wording is that of QEMU ``qapi/qmp-dispatch.c``, since clients look at it.
"""

from __future__ import annotations

import contextlib
import logging
from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager
from typing import Any

import msgspec

from stillframe.board.monitor.arguments import reader_of
from stillframe.board.monitor.descriptors import ClientDescriptors
from stillframe.errors import StillframeError
from stillframe.qmp.errors import QmpError

logger = logging.getLogger(__name__)


class NoArguments(msgspec.Struct, frozen=True):
    """Arguments of a command that takes none."""


class CommandContext:
    """The client that sent a command. ``fds``: the descriptors it handed over."""

    def __init__(self, fds: ClientDescriptors) -> None:
        self.fds = fds

    def take_fd(self) -> int:
        """Return the descriptor that came with this command; the caller owns it.

        Raises:
            QmpError: none came.
        """
        return self.fds.take_received()


class Command(msgspec.Struct, frozen=True):
    """``run``: takes the context and the JSON arguments. ``locked``: whether to hold the lock."""

    run: Callable[[CommandContext, Mapping[str, object]], object]
    locked: bool


class CommandTable:
    """A table of commands by name.

    Args:
        lock: held while a command runs, like QEMU's big lock. Add a command with ``locked=False``
            if it waits for a thread that needs the lock.
    """

    def __init__(self, lock: AbstractContextManager[Any] | None = None) -> None:
        self._lock: AbstractContextManager[Any] = lock or contextlib.nullcontext()
        self._commands: dict[str, Command] = {}

    def add(
        self,
        name: str,
        function: Callable[[CommandContext, Any], object],
        *,
        arguments: type[msgspec.Struct] | None = None,
        locked: bool = True,
    ) -> None:
        """Add a command.

        The function returns a JSON value; None becomes ``{}``. To fail, it raises QmpError or any
        StillframeError, whose text becomes the answer. The client's own thread calls it, one
        command at a time.

        Args:
            arguments: the type of the function's second argument (see
                ``board.monitor.arguments``); None for a command without arguments, whose function
                gets ``NoArguments()``.
            locked: whether to run it under the table's lock.
        """
        if name in self._commands:
            raise ValueError(f"there is a command {name} already")
        read = reader_of(arguments or NoArguments)
        self._commands[name] = Command(
            lambda context, given: function(context, read(given)), locked
        )

    def names(self) -> list[str]:
        """Return all names, sorted."""
        return sorted(self._commands)

    def run(self, name: str, context: CommandContext, arguments: Mapping[str, object]) -> object:
        """Run a command.

        Raises:
            QmpError: there is no such command, its arguments are wrong, or it failed.
        """
        command = self._commands.get(name)
        if command is None:
            raise QmpError(f"The command {name} has not been found", "CommandNotFound")
        try:
            with self._lock if command.locked else contextlib.nullcontext():
                result = command.run(context, arguments)
        except QmpError:
            raise
        except StillframeError as error:
            raise QmpError(str(error)) from error
        except Exception as error:
            # One command's bug must not end the machine and its guest.
            logger.exception("the command %s failed", name)
            raise QmpError(f"internal error in {name}: {error!r}") from error
        return {} if result is None else result


def command_of(message: object) -> tuple[str, Mapping[str, object]]:
    """Return the command name and arguments of a message.

    Raises:
        QmpError: the message is not a command.
    """
    if not isinstance(message, dict):
        raise QmpError("QMP input must be a JSON object")
    for name, value in message.items():
        if name == "execute":
            if not isinstance(value, str):
                raise QmpError("QMP input member 'execute' must be a string")
        elif name == "arguments":
            if not isinstance(value, dict):
                raise QmpError("QMP input member 'arguments' must be an object")
        elif name != "id":
            raise QmpError(f"QMP input member '{name}' is unexpected")
    if "execute" not in message:
        raise QmpError("QMP input lacks member 'execute'")
    return message["execute"], message.get("arguments", {})
