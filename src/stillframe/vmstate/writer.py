"""An encoder of the parts of QEMU's migration stream, version 3: pure functions.

A whole stream is, in this order: :func:`stream_header`, :func:`configuration_section`,
:func:`ram_start_section`, early device sections, RAM parts (:func:`ram_part_prefix`, page records,
:func:`ram_part_suffix`), :func:`ram_end_section`, the other device sections' ``raw``, :func:`eof`,
:func:`vmdescription`.

Sources: QEMU ``migration/savevm.c``, ``migration/ram.c``. All integers big-endian.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping, Sequence
from struct import Struct
from typing import Any

from stillframe.errors import UsageError
from stillframe.vmstate.devices import DeviceSection, encode_name, section_footer, section_header
from stillframe.vmstate.page_records import page_records, zero_records
from stillframe.vmstate.wire import (
    RAM_IDSTR,
    RAM_INSTANCE_ID,
    RAM_VERSION,
    STREAM_MAGIC,
    STREAM_VERSION,
    RamFlag,
    SectionType,
)

PREFERRED_RAM_SECTION_ID = 2
"""QEMU's own choice: block 1, ram 2, dirty-bitmap 3, devices from 4 on."""

_U32 = Struct(">I")
_U64 = Struct(">Q")
_TYPE_ID = Struct(">BI")
_FLAG_BITS = 0x3FF
_OFFSET_LIMIT = 1 << 64
_ID_LIMIT = 0xFFFFFFFF


def stream_header() -> bytes:
    """Encode magic and version."""
    return _U32.pack(STREAM_MAGIC) + _U32.pack(STREAM_VERSION)


def configuration_section(machine_type: str) -> bytes:
    """Encode the configuration section, without subsections.

    Args:
        machine_type: the machine's class name without ``-machine``, never an alias: ``pc-q35-7.2``
            and not ``q35``. The loading QEMU compares it with its own.

    Raises:
        UsageError: the name is empty, too long, not ASCII, or ends with ``-machine``.
    """
    name = encode_name(machine_type)
    if machine_type.endswith("-machine"):
        raise UsageError(f"machine type {machine_type!r} must be without its '-machine'")
    return bytes((SectionType.CONFIGURATION,)) + _U32.pack(len(name)) + name


def ram_start_section(
    blocks: Sequence[tuple[str, int]], *, section_id: int, footer: bool = True
) -> bytes:
    """Encode the START section of RAM: the list of all blocks, without any page.

    Args:
        blocks: (idstr, used length in bytes) of every migratable block.
        section_id: from :func:`choose_section_id`.
        footer: whether the stream's sections have footers.

    Raises:
        UsageError: a name is malformed or repeated, a length is no multiple of the smallest page,
            or the section id is 0 (which QEMU's loader takes for another section).
    """
    _check_section_id(section_id)
    return b"".join(
        (
            section_header(
                SectionType.START,
                section_id=section_id,
                idstr=RAM_IDSTR,
                instance_id=RAM_INSTANCE_ID,
                version_id=RAM_VERSION,
            ),
            ram_block_list(blocks),
            section_footer(section_id) if footer else b"",
        )
    )


def ram_block_list(blocks: Sequence[tuple[str, int]]) -> bytes:
    """Encode the payload of RAM's START section: the list of all blocks, and EOS.

    Args:
        blocks: (idstr, used length in bytes) of every migratable block.

    Raises:
        UsageError: a name is malformed or repeated, or a length is no multiple of the smallest
            page.
    """
    names = [idstr for idstr, _ in blocks]
    if len(set(names)) != len(names):
        raise UsageError("two RAM blocks have the same name")
    parts = [_word(sum(length for _, length in blocks), RamFlag.MEM_SIZE)]
    for idstr, used_length_bytes in blocks:
        if used_length_bytes <= 0 or used_length_bytes & _FLAG_BITS:
            raise UsageError(f"RAM block '{idstr}' has an odd length of {used_length_bytes} bytes")
        parts += (_name(idstr), _U64.pack(used_length_bytes))
    return b"".join(parts) + ram_eos()


def ram_eos() -> bytes:
    """Encode the EOS record, which ends every RAM section's payload."""
    return _word(0, RamFlag.EOS)


def ram_part_prefix(section_id: int) -> bytes:
    """Encode the header of a RAM part; page records follow it."""
    _check_section_id(section_id)
    return _TYPE_ID.pack(SectionType.PART, section_id)


def ram_part_suffix(section_id: int, *, footer: bool = True) -> bytes:
    """Encode the end of a RAM part: EOS record and footer."""
    _check_section_id(section_id)
    return ram_eos() + (section_footer(section_id) if footer else b"")


def ram_end_section(section_id: int, *, footer: bool = True) -> bytes:
    """Encode a whole END section of RAM, without page records."""
    suffix = ram_part_suffix(section_id, footer=footer)
    return _TYPE_ID.pack(SectionType.END, section_id) + suffix


def ram_page_record(offset_bytes: int, page: bytes, *, block: str | None) -> bytes:
    """One page's content.

    Args:
        offset_bytes: the page's offset in its block.
        page: exactly one target page.
        block: the block's name, or None for the block of the record before.
    """
    return page_records(offset_bytes, page, block=block, page_bytes=len(page))


def ram_zero_record(offset_bytes: int, *, block: str | None) -> bytes:
    """One page full of zeroes; arguments as for :func:`ram_page_record`."""
    return zero_records(offset_bytes, 1, block=block)


def eof() -> bytes:
    """Encode the end of the sections."""
    return bytes((SectionType.EOF,))


def vmdescription(description: Mapping[str, Any]) -> bytes:
    """Encode the description that follows EOF, as QEMU's compact JSON writer does."""
    text = json.dumps(description, separators=(", ", ": "), ensure_ascii=True).encode("ascii")
    # scripts/analyze-migration.py looks for the JSON's start after the last NUL.
    while b"{" in _U32.pack(len(text)):
        text = b"{ " + text[1:]
    return _TYPE_ID.pack(SectionType.VMDESCRIPTION, len(text)) + text


def choose_section_id(device_sections: Iterable[DeviceSection]) -> int:
    """Return a non-zero section id that no device section uses; QEMU's own for RAM if free.

    QEMU's loader matches RAM parts by this id alone, and an entry not loaded yet has id 0 there.
    """
    taken = {section.section_id for section in device_sections}
    if PREFERRED_RAM_SECTION_ID not in taken:
        return PREFERRED_RAM_SECTION_ID
    candidate = max(taken) + 1
    return candidate if candidate <= _ID_LIMIT else min(set(range(1, len(taken) + 2)) - taken)


def _name(name: str) -> bytes:
    encoded = encode_name(name)
    return bytes((len(encoded),)) + encoded


def _word(offset_bytes: int, flags: RamFlag) -> bytes:
    if offset_bytes & _FLAG_BITS or not 0 <= offset_bytes < _OFFSET_LIMIT:
        raise UsageError(f"offset or length {offset_bytes} is no multiple of a page")
    # int(): an IntFlag caches every new combination forever.
    return _U64.pack(offset_bytes | int(flags))


def _check_section_id(section_id: int) -> None:
    if not 0 < section_id <= _ID_LIMIT:
        raise UsageError(f"RAM section id {section_id} must be from 1 to 0xffffffff")
