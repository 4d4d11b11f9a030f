"""Guest placement in RAM, with all that the boot protocol promises (docs/design/board.md)."""

from __future__ import annotations

import struct

import msgspec

from stillframe.board.hardware.elf import Guest
from stillframe.board.hardware.layout import (
    COMMAND_LINE_GPA,
    DIMM_GPA,
    GDT_GPA,
    INFO_GPA,
    STACK_BYTES,
    VRAM_GPA,
)
from stillframe.board.memory.guest_ram import GuestRam

MAGIC = 0x31306472616F6273
"""``sboard01``."""

_INFO = struct.Struct("<10Q")
_DIMM_AT = 7 * 8
_RETURN_ADDRESS_BYTES = 8
_GDT = struct.pack(
    "<3Q",
    0,
    0x00AF9B000000FFFF,  # 64-bit code, privilege 0, accessed (Intel SDM 3A, 3.4.5)
    0x00CF93000000FFFF,  # data, writable, privilege 0, accessed
)
_ZEROES = bytes(1 << 20)


class BoardInformation(msgspec.Struct, frozen=True, kw_only=True):
    """What the guest learns about its board; sizes in bytes, pixels and sectors of 512 bytes."""

    ram_bytes: int
    vcpus: int
    width: int
    height: int
    disk_sectors: int
    dimm_bytes: int
    command_line: str


def stack_gpa(ram_bytes: int, vcpu: int) -> int:
    """Return the initial RSP: the top of the vCPU's stack, less a return address, so that the entry
    point may be a C function (System V ABI, 3.2.2)."""
    return ram_bytes - vcpu * STACK_BYTES - _RETURN_ADDRESS_BYTES


def place(ram: GuestRam, guest: Guest, information: BoardInformation, *, fresh: bool) -> None:
    """Write the guest and what the boot protocol promises into ``board.ram``. No vCPU may run.

    Args:
        fresh: RAM was never written, so skip the zeroes.
    """
    for segment in guest.segments:
        ram.write(segment.gpa, segment.data)
        if not fresh:
            _clear(ram, segment.gpa + len(segment.data), segment.gpa + segment.memory_bytes)
    ram.write(GDT_GPA, _GDT)
    ram.write(
        INFO_GPA,
        _INFO.pack(
            MAGIC,
            information.ram_bytes,
            information.vcpus,
            VRAM_GPA,
            information.width,
            information.height,
            information.disk_sectors,
            *_dimm(information.dimm_bytes),
            COMMAND_LINE_GPA,
        ),
    )
    ram.write(COMMAND_LINE_GPA, information.command_line.encode() + b"\0")
    for vcpu in range(information.vcpus):
        ram.write(stack_gpa(information.ram_bytes, vcpu), bytes(_RETURN_ADDRESS_BYTES))


def tell_of_dimm(ram: GuestRam, dimm_bytes: int) -> None:
    """Write hot-plugged RAM into the board information. No vCPU may run."""
    ram.write(INFO_GPA + _DIMM_AT, struct.pack("<2Q", *_dimm(dimm_bytes)))


def _dimm(dimm_bytes: int) -> tuple[int, int]:
    return (DIMM_GPA, dimm_bytes) if dimm_bytes else (0, 0)


def _clear(ram: GuestRam, start: int, end: int) -> None:
    while start < end:
        length_bytes = min(end - start, len(_ZEROES))
        ram.write(start, _ZEROES[:length_bytes])
        start += length_bytes
