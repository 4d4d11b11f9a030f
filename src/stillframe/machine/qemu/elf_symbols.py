"""A small reader of ELF64 ``.dynsym``, to find an exported symbol of a running program.

The address comes from the program's own dynamic section, through its GNU hash table (or the older
SysV one). So it needs neither section headers nor debug data, and reads only a few hundred bytes of
the file. The load bias comes from the auxiliary vector.

Sources: System V gABI (ELF-64), the DT_GNU_HASH layout as glibc's ``elf/dl-lookup.c`` reads it,
proc(5) for ``/proc/PID/auxv`` and ``/proc/PID/exe``.
"""

from __future__ import annotations

import os
import struct
from pathlib import Path

import msgspec

_PT_LOAD, _PT_DYNAMIC, _PT_PHDR = 1, 2, 6
_DT_HASH, _DT_STRTAB, _DT_SYMTAB, _DT_STRSZ, _DT_GNU_HASH = 4, 5, 6, 10, 0x6FFFFEF5
_AT_NULL, _AT_PHDR = 0, 3
_ET_EXEC, _ET_DYN = 2, 3
_SYMBOL_BYTES = 24
_HEADERS_MAX = 128
_DYNAMIC_MAX_BYTES = 64 * 1024
_CHAIN_MAX = 1_000_000


class ElfError(Exception):
    """The file is not an ELF that we can read; the caller falls back to another way."""


class _Segment(msgspec.Struct, frozen=True):
    kind: int
    offset: int
    vaddr: int
    file_bytes: int


class ElfFile:
    """One ELF64 little-endian file behind a descriptor."""

    def __init__(self, fd: int) -> None:
        self._fd = fd
        header = self._at(0, 64)
        if header[:6] != b"\x7fELF\x02\x01":
            raise ElfError("not a little-endian ELF64 file")
        self.kind = struct.unpack_from("<H", header, 16)[0]
        (phoff,) = struct.unpack_from("<Q", header, 32)
        entry_bytes, count = struct.unpack_from("<HH", header, 54)
        if entry_bytes != 56 or not 0 < count <= _HEADERS_MAX or self.kind not in (2, 3):
            raise ElfError("unusual program headers")
        table = self._at(phoff, 56 * count)
        self.segments = []
        for start in range(0, len(table), 56):
            kind, _flags, offset, vaddr, _paddr, file_bytes = struct.unpack_from(
                "<IIQQQQ", table, start
            )
            self.segments.append(_Segment(kind, offset, vaddr, file_bytes))
        self.phdr_vaddr = self._phdr_vaddr(phoff)

    def _phdr_vaddr(self, phoff: int) -> int:
        for segment in self.segments:
            if segment.kind == _PT_PHDR:
                return segment.vaddr
        for segment in self.segments:
            if segment.kind == _PT_LOAD and segment.offset <= phoff < (
                segment.offset + segment.file_bytes
            ):
                return segment.vaddr + phoff - segment.offset
        raise ElfError("program headers are not loaded")

    def _at(self, offset: int, length: int) -> bytes:
        try:
            data = os.pread(self._fd, length, offset)
        except (OSError, OverflowError) as error:
            raise ElfError(str(error)) from error
        if len(data) != length:
            raise ElfError(f"truncated at byte {offset}")
        return data

    def load(self, vaddr: int, length: int) -> bytes:
        """Return the file's bytes that are loaded at ``vaddr`` (before the bias is added)."""
        for segment in self.segments:
            start = vaddr - segment.vaddr
            if segment.kind == _PT_LOAD and 0 <= start <= segment.file_bytes - length:
                return self._at(segment.offset + start, length)
        raise ElfError(f"address {vaddr:#x} is not in the file")

    def word(self, vaddr: int) -> int:
        value: int = struct.unpack("<I", self.load(vaddr, 4))[0]
        return value

    def dynamic(self) -> dict[int, int]:
        """Return the dynamic section, with the first value of each tag."""
        for segment in self.segments:
            if segment.kind == _PT_DYNAMIC and segment.file_bytes <= _DYNAMIC_MAX_BYTES:
                usable = segment.file_bytes // 16 * 16
                tags: dict[int, int] = {}
                for tag, value in struct.iter_unpack("<QQ", self._at(segment.offset, usable)):
                    if tag == 0:
                        break
                    tags.setdefault(tag, value)
                return tags
        raise ElfError("statically linked")

    def find(self, name: str) -> int | None:
        """Return the value (unbiased address) of a defined symbol, or None."""
        tags = self.dynamic()
        try:
            symtab, strtab, strtab_bytes = (tags[t] for t in (_DT_SYMTAB, _DT_STRTAB, _DT_STRSZ))
        except KeyError as error:
            raise ElfError("no dynamic symbol table") from error
        wanted = name.encode() + b"\0"
        if _DT_GNU_HASH in tags:
            indices = self._gnu_candidates(tags[_DT_GNU_HASH], name)
        elif _DT_HASH in tags:
            indices = list(range(min(self.word(tags[_DT_HASH] + 4), _CHAIN_MAX)))
        else:
            raise ElfError("no symbol hash table")
        for index in indices:
            entry = self.load(symtab + _SYMBOL_BYTES * index, _SYMBOL_BYTES)
            name_offset, _info, _other, section, value, _size = struct.unpack("<IBBHQQ", entry)
            if section == 0 or name_offset + len(wanted) > strtab_bytes:
                continue
            if self.load(strtab + name_offset, len(wanted)) == wanted:
                return int(value)
        return None

    def _gnu_candidates(self, table: int, name: str) -> list[int]:
        """Return the indices of the symbols in ``name``'s bucket whose hash matches."""
        buckets, first_index, bloom_words, _shift = struct.unpack("<IIII", self.load(table, 16))
        if buckets == 0:
            return []
        bucket_table = table + 16 + 8 * bloom_words
        chain_table = bucket_table + 4 * buckets
        wanted = _gnu_hash(name)
        index = self.word(bucket_table + 4 * (wanted % buckets))
        found: list[int] = []
        if index < first_index:
            return found
        for _ in range(_CHAIN_MAX):
            value = self.word(chain_table + 4 * (index - first_index))
            if value | 1 == wanted | 1:
                found.append(index)
            if value & 1:
                break
            index += 1
        return found


def _gnu_hash(name: str) -> int:
    value = 5381
    for byte in name.encode():
        value = (value * 33 + byte) & 0xFFFFFFFF
    return value


def symbol_address(pid: int, name: str) -> int | None:
    """Return the address of an exported symbol in the address space of ``pid``.

    Returns None if the program does not export it. The process is only read.

    Raises:
        ElfError: the program is no ELF64, or is not loaded in the usual way.
        OSError: ``/proc/PID`` cannot be read (no permission, or the process is gone).
    """
    fd = os.open(f"/proc/{pid}/exe", os.O_RDONLY | os.O_CLOEXEC)
    try:
        elf = ElfFile(fd)
        value = elf.find(name)
        if value is None:
            return None
        return value + (_load_bias(pid, elf) if elf.kind == _ET_DYN else 0)
    finally:
        os.close(fd)


def _load_bias(pid: int, elf: ElfFile) -> int:
    vector = Path(f"/proc/{pid}/auxv").read_bytes()
    for kind, value in struct.iter_unpack("<QQ", vector[: len(vector) // 16 * 16]):
        if kind == _AT_PHDR:
            return int(value) - elf.phdr_vaddr
        if kind == _AT_NULL:
            break
    raise ElfError("no AT_PHDR in the auxiliary vector")
