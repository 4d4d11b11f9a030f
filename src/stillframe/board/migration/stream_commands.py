"""Writers and parsers of a live stream's COMMAND records.

Source: QEMU ``migration/savevm.c``: qemu_savevm_send_*, loadvm_postcopy_handle_advise,
loadvm_postcopy_ram_handle_discard.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from struct import Struct

from stillframe.errors import DataError
from stillframe.model import TARGET_PAGE_BYTES
from stillframe.vmstate.devices import encode_name
from stillframe.vmstate.wire import CommandCode, SectionType

MOST_PACKAGED_BYTES = 16 << 20
"""QEMU's own limit (``MAX_VM_CMD_PACKAGED_SIZE``)."""

_HEAD = Struct(">BHH")
_U32 = Struct(">I")
_RANGE = Struct(">QQ")
_DISCARD_VERSION = 0
_RANGES_A_COMMAND = 12
_PAGE_SIZES = _RANGE.pack(TARGET_PAGE_BYTES, TARGET_PAGE_BYTES)
"""The page sizes of all RAM blocks, ORed into one word, and the target page size."""


def command(code: CommandCode, data: bytes = b"") -> bytes:
    """Return one COMMAND record."""
    return _HEAD.pack(SectionType.COMMAND, code, len(data)) + data


def ping(number: int) -> bytes:
    """Return a PING, which asks the destination for a PONG with this number."""
    return command(CommandCode.PING, _U32.pack(number))


def postcopy_advise() -> bytes:
    """Return the notice that postcopy may follow; a destination that cannot do it refuses."""
    return command(CommandCode.POSTCOPY_ADVISE, _PAGE_SIZES)


def packaged(content: bytes) -> bytes:
    """Pack sections and commands that the destination reads as a whole before it loads any.

    Raises:
        DataError: ``content`` is larger than a destination accepts.
    """
    if len(content) > MOST_PACKAGED_BYTES:
        raise DataError(f"{len(content)} bytes of device state are too many for postcopy")
    return command(CommandCode.PACKAGED, _U32.pack(len(content))) + content


def ram_discard(idstr: str, runs: Sequence[tuple[int, int]]) -> Iterator[bytes]:
    """Yield commands that make the destination discard these pages.

    Args:
        runs: (first page, pages) within the block.
    """
    name = encode_name(idstr)
    head = bytes((_DISCARD_VERSION, len(name))) + name + b"\0"
    for at in range(0, len(runs), _RANGES_A_COMMAND):
        yield command(
            CommandCode.POSTCOPY_RAM_DISCARD,
            head
            + b"".join(
                _RANGE.pack(first * TARGET_PAGE_BYTES, pages * TARGET_PAGE_BYTES)
                for first, pages in runs[at : at + _RANGES_A_COMMAND]
            ),
        )


def read_number(data: bytes, what: str) -> int:
    """Read the 32-bit number of a PING or PACKAGED command.

    Raises:
        DataError: the data is not 4 bytes long.
    """
    if len(data) != _U32.size:
        raise DataError(f"{what} received with bad length - expecting 4, got {len(data)}")
    number: int = _U32.unpack(data)[0]
    return number


def check_advise(data: bytes) -> None:
    """Compare the source's page sizes with ours.

    Raises:
        DataError: they differ, or the source did not announce RAM.
    """
    if data != _PAGE_SIZES:
        raise DataError("Postcopy needs matching RAM page sizes", why=f"received {data.hex()}")


def read_discard(data: bytes) -> tuple[str, list[tuple[int, int]]]:
    """Return the block name and the runs (first page, pages) of a discard.

    Raises:
        DataError: the data is malformed.
    """
    name_end = 2 + (data[1] if len(data) > 1 else 0)
    if len(data) < name_end + 1 or data[0] != _DISCARD_VERSION or data[name_end] != 0:
        raise DataError(f"CMD_POSTCOPY_RAM_DISCARD is malformed ({len(data)} bytes)")
    try:
        idstr = data[2:name_end].decode("ascii")
    except UnicodeDecodeError:
        raise DataError("CMD_POSTCOPY_RAM_DISCARD has a malformed block name") from None
    ranges = data[name_end + 1 :]
    if len(ranges) % _RANGE.size:
        raise DataError(f"CMD_POSTCOPY_RAM_DISCARD invalid length ({len(data)})")
    runs = []
    for start, length in _RANGE.iter_unpack(ranges):
        if start % TARGET_PAGE_BYTES or length % TARGET_PAGE_BYTES:
            raise DataError("CMD_POSTCOPY_RAM_DISCARD of parts of pages")
        runs.append((start // TARGET_PAGE_BYTES, length // TARGET_PAGE_BYTES))
    return idstr, runs
