"""QEMU's own list of RAM blocks, read from its memory without stopping it.

``ram_list`` is a global that builds with modules export. The layout is that of QEMU 5.2 to 10.2 on
x86-64 with glibc (``include/exec/ramlist.h``, ``include/exec/ramblock.h``). It is never trusted
alone: the caller compares every block with the monitor's ``info ramblock``. The list may change
during a read, so a walk is bounded and any pointer may be stale.
"""

from __future__ import annotations

import os
import struct

import msgspec

from stillframe.kernel.proc_maps import proc_error
from stillframe.machine.qemu.elf_symbols import ElfError, symbol_address

HEAD_OFFSETS = (56, 72)
"""Offset of the first block's pointer, behind mutex and mru_block; CONFIG_DEBUG_MUTEX enlarges the
mutex."""

_BLOCK_BYTES = 344
_HOST, _OFFSET, _FLAGS, _IDSTR, _NEXT = 24, 40, 72, 76, 336
_IDSTR_BYTES = 256
_BLOCKS_MAX = 4096
_LENGTH_MAX_BYTES = 1 << 48

RAM_MIGRATABLE = 1 << 4
RAM_PROTECTED = 1 << 8
RAM_GUEST_MEMFD = 1 << 12


class ListedBlock(msgspec.Struct, frozen=True, kw_only=True):
    """A RAMBlock from QEMU's memory; ``flags`` are RAM_* of ``include/exec/memory.h``."""

    idstr: str
    hva: int
    ram_addr: int
    used_length_bytes: int
    max_length_bytes: int
    flags: int


class RamListError(Exception):
    """The list cannot be read now (torn), or has another layout."""


class RamList:
    """A read-only handle on the ``ram_list`` of one process."""

    def __init__(self, pid: int) -> None:
        """Find the list.

        Raises:
            RamListError: the program does not export it.
            HostError: reading is not permitted. MachineError: the process is gone.
        """
        self._pid = pid
        self._fd = -1
        try:
            address = symbol_address(pid, "ram_list")
            if address is None:
                raise RamListError("the program does not export ram_list")
            self._fd = os.open(f"/proc/{pid}/mem", os.O_RDONLY | os.O_CLOEXEC)
        except ElfError as error:
            raise RamListError(str(error)) from error
        except OSError as error:
            raise proc_error(pid, "the memory", error) from error
        self._address = address

    def close(self) -> None:
        """Close the descriptor."""
        if self._fd >= 0:
            os.close(self._fd)
            self._fd = -1

    def walk(self, head_offset: int) -> list[ListedBlock]:
        """Return the blocks in QEMU's order, if the list's head is at ``head_offset``.

        Raises:
            RamListError: the list makes no sense, now or with this layout.
        """
        pointer: int = struct.unpack("<Q", self._read(self._address + head_offset, 8))[0]
        blocks: list[ListedBlock] = []
        seen: set[int] = set()
        while pointer:
            if pointer in seen or len(seen) >= _BLOCKS_MAX:
                raise RamListError("the list does not end")
            seen.add(pointer)
            raw = self._read(pointer, _BLOCK_BYTES)
            blocks.append(_block_of(raw))
            pointer = struct.unpack_from("<Q", raw, _NEXT)[0]
        if not blocks:
            raise RamListError("the list is empty")
        return blocks

    def _read(self, address: int, length: int) -> bytes:
        try:
            data = os.pread(self._fd, length, address)
        except (OSError, OverflowError) as error:
            raise RamListError(f"address {address:#x} is not readable") from error
        if len(data) != length:
            raise RamListError(f"address {address:#x} is not wholly mapped")
        return data


def _block_of(raw: bytes) -> ListedBlock:
    hva: int = struct.unpack_from("<Q", raw, _HOST)[0]
    offset, used, maximum = struct.unpack_from("<QQQ", raw, _OFFSET)
    (flags,) = struct.unpack_from("<I", raw, _FLAGS)
    name, end, _ = raw[_IDSTR : _IDSTR + _IDSTR_BYTES].partition(b"\0")
    if not end or not name.isascii() or not name.decode("ascii").isprintable():
        raise RamListError("a block's name is not text")
    if not 0 < used <= maximum < _LENGTH_MAX_BYTES or hva == 0:
        raise RamListError("a block's lengths make no sense")
    return ListedBlock(
        idstr=name.decode("ascii"),
        hva=hva,
        ram_addr=offset,
        used_length_bytes=used,
        max_length_bytes=maximum,
        flags=flags,
    )
