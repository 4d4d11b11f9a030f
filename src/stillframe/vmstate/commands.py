"""COMMAND records: those that only inform are handed on, the others are refused by name.

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
    CommandCode.SWITCHOVER_START: (0,),
}
"""Commands that a stream in a file may have, and the lengths of their data."""


def read_command(source: StreamSource) -> Command:
    """Read the record whose type byte was just taken.

    Raises:
        DataError: truncated, malformed, unknown, or a command of a postcopy or COLO stream,
            whose pages come on request only and so are not all in the stream.
    """
    start = source.offset - 1
    number = source.u16("a command")
    length = source.u16("a command")
    try:
        code = CommandCode(number)
    except ValueError:
        raise DataError(f"unknown command {number}", offset_bytes=start) from None
    lengths = _LENGTHS.get(code)
    if lengths is None:
        raise DataError(
            f"the stream uses command {code.name}",
            why="postcopy and COLO streams do not hold the whole VM",
            remedy="save the VM without capabilities postcopy-ram and x-colo",
            offset_bytes=start,
        )
    if length not in lengths:
        raise DataError(f"command {code.name} has {length} bytes of data", offset_bytes=start)
    return Command(code, source.take(length, f"command {code.name}"))
