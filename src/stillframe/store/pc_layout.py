"""Where a PC's RAM block, and a board's, are in guest-physical memory, when nobody recorded it.

Sources: ``docs/design/board.md``, "Address space"; QEMU ``hw/i386/pc_q35.c`` (``pc_q35_init``) and
``hw/i386/pc_piix.c`` (``pc_init1``): RAM up to a limit starts at 0, the rest at 4 GiB, unless
``max-ram-below-4g`` was given.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Final

from stillframe.model import BlockRecord, GpaRange
from stillframe.vmstate.board_cpu import BOARD_MACHINE_PREFIX

_GIB_4: Final = 4 << 30
_RAM_MAX_BYTES: Final = 512 << 30
"""Above, the part from 4 GiB on may be elsewhere: AMD hosts keep a hole below 1 TiB."""

_BOARD: Final = {"board.ram": 0, "board.vram": 0xE0000000, "board.dimm0": _GIB_4}

_Q35 = (0xB0000000, 0x80000000)
_PIIX = (0xE0000000, 0xC0000000)
"""RAM of this size and more is split; then so much of it is below 4 GiB."""


def assumed_memory_map(
    machine_type: str | None, blocks: Sequence[BlockRecord]
) -> tuple[GpaRange, ...]:
    """The main RAM's map of a ``pc-q35-*`` or ``pc-i440fx-*``, and all RAM of a board; empty for
    other machines.

    Args:
        machine_type: the name in the stream's configuration section.
        blocks: the stream's RAM blocks; the first of the largest is the main RAM if none is
            called ``pc.ram``.
    """
    name = machine_type or ""
    if name.startswith(BOARD_MACHINE_PREFIX):
        return tuple(
            GpaRange(gpa=gpa, length_bytes=b.used_length_bytes, idstr=b.idstr, offset_bytes=0)
            for idstr, gpa in _BOARD.items()
            for b in blocks
            if b.idstr == idstr
        )
    if name.startswith("pc-q35-"):
        split_from, low = _Q35
    elif name.startswith("pc-i440fx-"):
        split_from, low = _PIIX
    else:
        return ()
    ram = next((b for b in blocks if b.idstr == "pc.ram"), None)
    ram = ram or max(blocks, key=lambda b: b.used_length_bytes, default=None)
    if ram is None or ram.used_length_bytes > _RAM_MAX_BYTES:
        return ()
    size = ram.used_length_bytes
    below = size if size < split_from else low
    ranges = [GpaRange(gpa=0, length_bytes=below, idstr=ram.idstr, offset_bytes=0)]
    if below < size:
        ranges.append(
            GpaRange(gpa=_GIB_4, length_bytes=size - below, idstr=ram.idstr, offset_bytes=below)
        )
    return tuple(ranges)
