"""COMMAND records: informational ones are accepted, all others are refused by name.

Source: QEMU ``migration/savevm.c``, ``qemu_vm_cmd`` and ``mig_cmd_args``.
"""

from __future__ import annotations

from stillframe.errors import DataError
from stillframe.vmstate.records import Command
from stillframe.vmstate.source import StreamSource
from stillframe.vmstate.wire import CommandCode

_LENGTHS = {
    CommandCode.OPEN_RETURN_PATH: (0,),
    CommandCode.PING: (4,),
    CommandCode.POSTCOPY_ADVISE: (0, 16),
    CommandCode.POSTCOPY_LISTEN: (0,),
    CommandCode.POSTCOPY_RUN: (0,),
    CommandCode.PACKAGED: (4,),
    CommandCode.ENABLE_COLO: (0,),
    CommandCode.POSTCOPY_RESUME: (0,),
    CommandCode.SWITCHOVER_START: (0,),
}
"""Data lengths of the commands that have a fixed one."""

_INFORMING = frozenset(
    {
        CommandCode.OPEN_RETURN_PATH,
        CommandCode.PING,
        CommandCode.POSTCOPY_ADVISE,
        CommandCode.SWITCHOVER_START,
    }
)
"""Commands allowed in a stored stream."""


def take_command(source: StreamSource) -> Command:
    """Read any command, after its type byte.

    Raises:
        DataError: truncated, malformed or unknown.
    """
    code, start, length = _head(source)
    return _data(source, code, start, length)


def read_command(source: StreamSource) -> Command:
    """Read a command as :func:`take_command`, but from a stored stream, where no reader can answer
    it.

    Raises:
        DataError: truncated, malformed, unknown, or a command of a postcopy or COLO stream, which
            sends pages on request only and so does not hold them all.
    """
    code, start, length = _head(source)
    if code not in _INFORMING:
        raise DataError(
            f"the stream uses command {code.name}",
            why="postcopy and COLO streams do not hold the whole VM",
            remedy="save the VM without capabilities postcopy-ram and x-colo",
            offset_bytes=start,
        )
    return _data(source, code, start, length)


def _head(source: StreamSource) -> tuple[CommandCode, int, int]:
    """Return the command code, the offset of the record and the data length."""
    start = source.offset - 1
    number = source.u16("a command")
    length = source.u16("a command")
    try:
        return CommandCode(number), start, length
    except ValueError:
        raise DataError(f"unknown command {number}", offset_bytes=start) from None


def _data(source: StreamSource, code: CommandCode, start: int, length: int) -> Command:
    lengths = _LENGTHS.get(code)
    if lengths is not None and length not in lengths:
        raise DataError(f"command {code.name} has {length} bytes of data", offset_bytes=start)
    return Command(code, source.take(length, f"command {code.name}"))
