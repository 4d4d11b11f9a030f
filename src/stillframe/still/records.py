"""Page records inside a decompressed RAM frame.

Format: QEMU ``migration/ram.c`` (``ram_save_page``, ``save_zero_page``): a big-endian word of
offset and flags, the block's name unless CONTINUE is set, then the page or a fill byte.
"""

from __future__ import annotations

import struct
from itertools import chain
from operator import eq
from typing import Final, NamedTuple

from stillframe.errors import DataError
from stillframe.still.frames import BytesLike
from stillframe.still.index import KIND_DATA, KIND_ZERO, WORD_BYTES, PageRun
from stillframe.vmstate.wire import RamFlag, SectionType

_WORD: Final = struct.Struct(">Q")
_TYPE_ID: Final = struct.Struct(">BI")
PREFIX_BYTES: Final = _TYPE_ID.size
_KIND_FLAG: Final = {KIND_DATA: RamFlag.PAGE.value, KIND_ZERO: RamFlag.ZERO.value}
_CONTINUE: Final = RamFlag.CONTINUE.value
_EOS: Final = RamFlag.EOS.value


class Record(NamedTuple):
    """One record: its block's name (None if CONTINUE), offset, kind, and where it ends."""

    idstr: str | None
    offset_bytes: int
    kind: int
    end: int


def record_bytes(kind: int, page_bytes: int) -> int:
    """Return the length of a record that names no block."""
    return WORD_BYTES + (page_bytes if kind == KIND_DATA else 1)


def payload_start(raw: BytesLike, run: PageRun, idstr: str, page_bytes: int) -> int:
    """Return where in a frame the content of the run's first page starts.

    The other pages follow at intervals of :func:`record_bytes`.

    Raises:
        DataError: the frame does not hold this run there.
    """
    record = read_record(raw, run.raw_offset, page_bytes)
    if (
        record is None
        or record.idstr not in (None, idstr)
        or record.kind != run.kind
        or record.offset_bytes != run.first_page * page_bytes
    ):
        raise DataError(
            f"the index does not agree with the stream about page {run.first_page} of block "
            f"{idstr!r}"
        )
    return record.end - record_bytes(run.kind, page_bytes) + WORD_BYTES


def read_page(
    raw: BytesLike, run: PageRun, position: int, idstr: str, page_bytes: int
) -> bytes | None:
    """Return the content of page number ``position`` of a run; None for a zero page.

    Raises:
        DataError: the frame does not hold this page there.
    """
    start = payload_start(raw, run, idstr, page_bytes)
    if position:
        start += position * record_bytes(run.kind, page_bytes)
        expected = (run.first_page + position) * page_bytes | _KIND_FLAG[run.kind] | _CONTINUE
        if raw[start - WORD_BYTES : start] != _WORD.pack(expected):
            raise DataError(
                f"the index does not agree with the stream about page {run.first_page + position} "
                f"of block {idstr!r}"
            )
    end = start + record_bytes(run.kind, page_bytes) - WORD_BYTES
    if end > len(raw):
        raise DataError("a page record is truncated")
    if run.kind == KIND_DATA:
        return bytes(raw[start:end])
    if raw[start] != 0:
        raise DataError(f"a zero page of block {idstr!r} is filled with {raw[start]:#04x}")
    return None


def check_run(raw: BytesLike, run: PageRun, idstr: str, page_bytes: int) -> int:
    """Check every record of a run against the index; return where the run ends.

    Raises:
        DataError: they do not agree.
    """
    start = payload_start(raw, run, idstr, page_bytes)
    length = record_bytes(run.kind, page_bytes)
    body = start + length - WORD_BYTES
    end = body + (run.pages - 1) * length
    if end > len(raw):
        raise DataError("a run of page records is truncated")
    flags = _KIND_FLAG[run.kind] | _CONTINUE
    first, last = run.first_page + 1, run.first_page + run.pages
    words = range(first * page_bytes | flags, last * page_bytes | flags, page_bytes)
    view = memoryview(raw)[body:end]
    if run.kind == KIND_DATA:
        found = struct.iter_unpack(f">Q{page_bytes}x", view)
        same = all(map(eq, chain.from_iterable(found), words))
    else:
        pairs = struct.iter_unpack(">QB", view)
        same = raw[start] == 0 and all(
            word == expected and fill == 0
            for (word, fill), expected in zip(pairs, words, strict=True)
        )
    if not same:
        raise DataError(
            f"the index does not agree with the stream about pages {run.first_page} to "
            f"{last - 1} of block {idstr!r}"
        )
    return end


def read_record(raw: BytesLike, start: int, page_bytes: int) -> Record | None:
    """Return the page record at ``start``; None if it is an EOS record.

    Raises:
        DataError: truncated, or a record that our frames do not have.
    """
    end = start + WORD_BYTES
    if end > len(raw):
        raise DataError("a RAM section does not end within its frame")
    (word,) = _WORD.unpack_from(raw, start)
    flags, offset_bytes = word & (page_bytes - 1), word & -page_bytes
    if flags == _EOS and offset_bytes == 0:
        return None
    idstr: str | None = None
    if not flags & _CONTINUE:
        name_end = end + 1 + (raw[end] if end < len(raw) else 0)
        name = bytes(raw[end + 1 : name_end])
        if not name or name_end > len(raw) or not name.isascii():
            raise DataError("a page record names its block in an odd way")
        idstr, end = name.decode("ascii"), name_end
    kinds = [kind for kind, flag in _KIND_FLAG.items() if flag == flags & ~_CONTINUE]
    if not kinds:
        raise DataError(f"a RAM section holds a record with flags {flags:#x}")
    end += record_bytes(kinds[0], page_bytes) - WORD_BYTES
    if end > len(raw):
        raise DataError("a page record is truncated")
    return Record(idstr, offset_bytes, kinds[0], end)


def read_section_id(raw: BytesLike) -> int:
    """Return the section id of the RAM part that a frame starts with.

    Raises:
        DataError: the frame does not start with a PART section.
    """
    if len(raw) < PREFIX_BYTES or raw[0] != SectionType.PART:
        raise DataError("a frame with pages does not start with a RAM section")
    _, section_id = _TYPE_ID.unpack_from(raw)
    return int(section_id)


def check_section_end(raw: BytesLike, start: int, section_id: int) -> None:
    """Check that the rest of the frame is EOS and, if the section has one, its footer.

    Raises:
        DataError: it is something else.
    """
    eos = _WORD.pack(_EOS)
    if bytes(raw[start:]) not in (eos, eos + _TYPE_ID.pack(SectionType.FOOTER, section_id)):
        raise DataError("a RAM section does not end with its frame")


def is_ram_section(raw: BytesLike, page_bytes: int) -> bool:
    """Return whether a frame is exactly one whole RAM part."""
    try:
        section_id = read_section_id(raw)
        position = PREFIX_BYTES
        while (record := read_record(raw, position, page_bytes)) is not None:
            position = record.end
        check_section_end(raw, position, section_id)
    except DataError:
        return False
    return True
