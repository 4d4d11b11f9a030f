"""A reader for guests: static x86-64 ELF executables. It does not trust the file.

Source: System V ABI, chapters 4 and 5; ``elf.h``.
"""

from __future__ import annotations

import struct
from pathlib import Path

import msgspec

from stillframe.board.guests import GUEST_NAMES
from stillframe.board.hardware.layout import GUEST_GPA
from stillframe.errors import DataError, HostError, NotFoundError, UsageError

FILE_LIMIT_BYTES = 256 << 20
_HEADER = struct.Struct("<16sHHIQQQIHHHHHH")
_SEGMENT = struct.Struct("<IIQQQQQQ")
_IDENT = b"\x7fELF\x02\x01\x01"
_CLASS_AT, _ORDER_AT = 4, 5
_EXECUTABLE = 2
_X86_64 = 62
_LOAD, _DYNAMIC, _INTERPRETER = 1, 2, 3
_SEGMENTS_LIMIT = 64


class Segment(msgspec.Struct, frozen=True, kw_only=True):
    """A part of a guest: ``data``, then zeroes up to ``memory_bytes``."""

    gpa: int
    memory_bytes: int
    data: bytes


class Guest(msgspec.Struct, frozen=True, kw_only=True):
    """A guest to place in RAM: its entry point and its parts."""

    entry: int
    segments: tuple[Segment, ...]


def read_guest(path: str, *, end_gpa: int) -> Guest:
    """Read a guest from its file.

    Args:
        end_gpa: where the stacks begin; the guest must end before it.

    Raises:
        NotFoundError: the file does not exist. UsageError: it is a directory.
        HostError: it cannot be read.
        DataError: it is not a guest for the board.
    """
    try:
        with Path(path).open("rb") as file:
            data = file.read(FILE_LIMIT_BYTES + 1)
    except (FileNotFoundError, NotADirectoryError) as error:
        raise NotFoundError(
            f"there is no guest {path}",
            remedy=f"name an ELF file, or one of {', '.join(GUEST_NAMES)}",
        ) from error
    except IsADirectoryError as error:
        raise UsageError(f"the guest {path} is a directory", remedy="name an ELF file") from error
    except OSError as error:
        raise HostError(f"the guest {path} cannot be read", why=error.strerror) from error
    try:
        return parse_guest(data, end_gpa=end_gpa)
    except DataError as error:
        raise DataError(f"{path}: {error.what}", why=error.why, remedy=error.remedy) from error


def parse_guest(data: bytes, *, end_gpa: int) -> Guest:
    """Parse the bytes of a guest's file; ``end_gpa`` and DataError as for ``read_guest``."""
    if len(data) > FILE_LIMIT_BYTES:
        raise DataError(f"a guest's file has at most {FILE_LIMIT_BYTES >> 20} MiB")
    if len(data) < _HEADER.size or data[:4] != _IDENT[:4]:
        raise DataError("it is no ELF file")
    header = _HEADER.unpack_from(data)
    _check_kind(header)
    entry, table_at, entry_bytes, entries = header[4], header[5], header[9], header[10]
    if entry_bytes != _SEGMENT.size or not 0 < entries <= _SEGMENTS_LIMIT:
        raise DataError(
            "its program headers make no sense", why=f"{entries} of {entry_bytes} bytes each"
        )
    if table_at + entries * entry_bytes > len(data):
        raise DataError("its program headers lie beyond its end")
    segments: list[Segment] = []
    for number in range(entries):
        fields = _SEGMENT.unpack_from(data, table_at + number * entry_bytes)
        if fields[0] in (_DYNAMIC, _INTERPRETER):
            raise DataError("it is linked dynamically", remedy="link it with -static and -no-pie")
        if fields[0] == _LOAD and fields[6]:
            segments.append(_segment(data, fields, end_gpa))
    _check_places(segments, entry)
    return Guest(entry=entry, segments=tuple(segments))


def _check_kind(header: tuple[bytes, int, int, int, int]) -> None:
    ident, kind, machine = header[0], header[1], header[2]
    if ident[_CLASS_AT] != _IDENT[_CLASS_AT] or ident[_ORDER_AT] != _IDENT[_ORDER_AT]:
        raise DataError("it is not 64-bit little-endian")
    if ident[:7] != _IDENT or header[3] != 1:
        raise DataError("it is an ELF file of an unknown version")
    if machine != _X86_64:
        raise DataError(f"it is for another processor (ELF machine {machine}), not for x86-64")
    if kind != _EXECUTABLE:
        raise DataError(
            "it is no executable at fixed addresses",
            why=f"ELF type {kind}",
            remedy="link it with -static and -no-pie",
        )


def _segment(data: bytes, fields: tuple[int, ...], end_gpa: int) -> Segment:
    _, _, offset, gpa, _, file_bytes, memory_bytes, _ = fields
    if file_bytes > memory_bytes:
        raise DataError(f"its segment at {gpa:#x} is longer in the file than in memory")
    if offset + file_bytes > len(data):
        raise DataError(f"its segment at {gpa:#x} lies beyond the file's end")
    if gpa < GUEST_GPA:
        raise DataError(
            f"its segment at {gpa:#x} is too low",
            why=f"a guest begins at {GUEST_GPA:#x} or above",
        )
    if gpa + memory_bytes > end_gpa:
        raise DataError(
            f"its segment at {gpa:#x} of {memory_bytes} bytes does not fit",
            why=f"the stacks begin at {end_gpa:#x}",
            remedy="give the board more RAM",
        )
    return Segment(gpa=gpa, memory_bytes=memory_bytes, data=data[offset : offset + file_bytes])


def _check_places(segments: list[Segment], entry: int) -> None:
    if not segments:
        raise DataError("it has nothing to load")
    end_gpa = 0
    for segment in sorted(segments, key=lambda segment: segment.gpa):
        if segment.gpa < end_gpa:
            raise DataError(f"its segments overlap at {segment.gpa:#x}")
        end_gpa = segment.gpa + segment.memory_bytes
    if not any(part.gpa <= entry < part.gpa + part.memory_bytes for part in segments):
        raise DataError(f"its entry point {entry:#x} is in none of its segments")
