"""Device sections: build them, split device state into them, change the run state, describe them.

Sources: QEMU ``migration/savevm.c`` (``qemu_save_device_state``, ``save_section_header``),
``migration/global_state.c``, ``scripts/analyze-migration.py``.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from struct import Struct
from typing import Any

import msgspec

from stillframe.errors import DataError, UsageError
from stillframe.vmstate.footers import FOOTER_BYTES, SectionSpan, cut_sections
from stillframe.vmstate.wire import NAME_LIMIT_BYTES, STREAM_MAGIC, STREAM_VERSION, SectionType

EARLY_SUFFIX = "virtio-mem-device-early"
"""The only sections that QEMU (8.0 to 10.2) puts before the RAM pages (``early_setup``)."""

GLOBAL_STATE_IDSTR = "globalstate"
GLOBAL_STATE_BYTES = 104
"""be32 length of the name with its NUL, then 100 bytes, in all versions of QEMU."""
_ESSENTIAL = frozenset({GLOBAL_STATE_IDSTR, "cpu", "vmcoreinfo"})
RUN_STATE_LIMIT_BYTES = 31
"""Since QEMU 9.0 the name takes 32 of the 100 bytes, including its NUL."""

_STREAM_HEADER = Struct(">II")
_U32 = Struct(">I")
_HEAD = Struct(">BIB")
_TAIL = Struct(">II")
_PART_HEAD = Struct(">BI")


class DeviceSection(msgspec.Struct, frozen=True, kw_only=True):
    """One FULL section of the stream.

    ``payload``: what the device's handler wrote. ``raw``: the whole section, from its type
    byte to the end of its footer, if it has one.
    """

    section_id: int
    idstr: str
    instance_id: int
    version_id: int
    payload: bytes
    raw: bytes

    @property
    def has_footer(self) -> bool:
        """Whether the section ends with a footer; with ``send-section-footer`` off, none does."""
        header_bytes = _HEAD.size + len(self.idstr) + _TAIL.size
        return len(self.raw) == header_bytes + len(self.payload) + FOOTER_BYTES


def make_section(
    *,
    section_id: int,
    idstr: str,
    instance_id: int,
    version_id: int,
    payload: bytes,
    footer: bool = True,
) -> DeviceSection:
    """Build a FULL section.

    Raises:
        UsageError: a number does not fit its field, or the name is empty, too long or not ASCII.
    """
    header = section_header(
        SectionType.FULL,
        section_id=section_id,
        idstr=idstr,
        instance_id=instance_id,
        version_id=version_id,
    )
    raw = header + payload + (section_footer(section_id) if footer else b"")
    return DeviceSection(
        section_id=section_id,
        idstr=idstr,
        instance_id=instance_id,
        version_id=version_id,
        payload=payload,
        raw=raw,
    )


def section_header(
    kind: SectionType, *, section_id: int, idstr: str, instance_id: int, version_id: int
) -> bytes:
    """Build a section header of any kind; PART and END carry the id only.

    Raises:
        UsageError: a number does not fit its field, or the name is empty, too long or not ASCII.
    """
    name = encode_name(idstr)
    for what, value in (
        ("section id", section_id),
        ("instance id", instance_id),
        ("version", version_id),
    ):
        if not 0 <= value <= 0xFFFFFFFF:
            raise UsageError(f"{what} {value} of section '{idstr}' does not fit 32 bits")
    if kind in (SectionType.PART, SectionType.END):
        return _PART_HEAD.pack(kind, section_id)
    return _HEAD.pack(kind, section_id, len(name)) + name + _TAIL.pack(instance_id, version_id)


def section_footer(section_id: int) -> bytes:
    """Build the footer that ends a section."""
    return bytes((SectionType.FOOTER,)) + _U32.pack(section_id)


def encode_name(name: str) -> bytes:
    """Encode a section's or block's name, without its length byte.

    Raises:
        UsageError: empty, longer than 255 bytes, or not ASCII.
    """
    try:
        encoded = name.encode("ascii")
    except UnicodeEncodeError:
        raise UsageError(f"name {name!r} is not ASCII") from None
    if not 0 < len(encoded) <= NAME_LIMIT_BYTES:
        raise UsageError(f"name {name[:40]!r} must have 1 to {NAME_LIMIT_BYTES} bytes")
    return encoded


def section_from_span(data: bytes, span: SectionSpan) -> DeviceSection:
    """Return the section of ``data`` at ``span``."""
    header = span.header
    return DeviceSection(
        section_id=header.section_id,
        idstr=header.idstr,
        instance_id=header.instance_id,
        version_id=header.version_id,
        payload=data[header.payload_start : span.payload_end],
        raw=data[header.start : span.end],
    )


def split_description(data: bytes) -> tuple[bytes, bytes]:
    """Split off the vmdescription section behind device state's EOF; it is empty if there is none.

    Raises:
        DataError: the data ends with neither.
    """
    if data[-1:] == bytes((SectionType.EOF,)):
        return data, b""
    marker = bytes((SectionType.EOF, SectionType.VMDESCRIPTION))
    at = data.rfind(marker)
    while at >= 0:  # the text has no NUL, but the length may
        (length,) = _U32.unpack(data[at + 2 : at + 6].ljust(4, b"\0"))
        if at + 6 + length == len(data):
            return data[: at + 1], data[at + 1 :]
        at = data.rfind(marker, 0, at)
    raise DataError(
        "the device state does not end with EOF",
        why="it is truncated, or something follows it",
        offset_bytes=max(0, len(data) - 1),
    )


def split_device_state(data: bytes) -> tuple[DeviceSection, ...]:
    """Split the output of ``xen-save-devices-state`` into sections, in order.

    The data is the stream header, FULL sections and an EOF byte; :mod:`stillframe.vmstate.footers`
    says how to find where a section ends.

    Raises:
        DataError: the data is something else, damaged, or ambiguous.
    """
    start = _STREAM_HEADER.size
    if len(data) < start + 1:
        raise DataError(
            "the device state is truncated",
            why=f"it has {len(data)} bytes",
            offset_bytes=len(data),
        )
    magic, version = _STREAM_HEADER.unpack_from(data)
    if magic != STREAM_MAGIC:
        raise DataError(
            "the device state does not start with QEMU's magic",
            why=f"found 0x{magic:08x}",
            offset_bytes=0,
        )
    if version != STREAM_VERSION:
        raise DataError(
            f"the device state has stream version {version}, only version 3 is known",
            offset_bytes=4,
        )
    last = len(data) - 1
    if data[last] != SectionType.EOF:
        raise DataError(
            "the device state does not end with EOF",
            why="it is truncated, or something follows it",
            offset_bytes=last,
        )
    if last == start:
        return ()
    spans = cut_sections(data, start, eof=last, essential=is_essential)
    return tuple(section_from_span(data, span) for span in spans)


def is_early_idstr(idstr: str) -> bool:
    """Return whether a section of this name belongs before the RAM pages."""
    return idstr.endswith(EARLY_SUFFIX)


def is_early(section: DeviceSection) -> bool:
    """Return whether the section belongs before the RAM pages."""
    return is_early_idstr(section.idstr)


def is_essential(idstr: str) -> bool:
    """Return whether we parse or move a section of this name instead of passing it through."""
    return idstr in _ESSENTIAL or is_early_idstr(idstr)


def find_section(
    sections: Iterable[DeviceSection], idstr: str, instance_id: int = 0
) -> DeviceSection | None:
    """Return the section with this name and instance, or None."""
    for section in sections:
        if section.idstr == idstr and section.instance_id == instance_id:
            return section
    return None


def run_state(sections: Iterable[DeviceSection]) -> str:
    """Return the run state in the ``globalstate`` section: the VM's state after loading.

    Raises:
        DataError: there is no such section, or it is malformed.
    """
    section = find_section(sections, GLOBAL_STATE_IDSTR)
    if section is None:
        raise DataError("the device state has no globalstate section")
    _check_global_state(section)
    (size,) = _U32.unpack_from(section.payload)
    return unpack_run_state(size, section.payload[4:])


def pack_run_state(state: str) -> tuple[int, bytes]:
    """Return the size and the 32-byte name field that store a run state in ``globalstate``.

    Raises:
        UsageError: the name is empty, too long or not ASCII.
    """
    name = encode_name(state)
    if len(name) > RUN_STATE_LIMIT_BYTES:
        raise UsageError(f"run state {state!r} has more than {RUN_STATE_LIMIT_BYTES} bytes")
    return len(name) + 1, name.ljust(RUN_STATE_LIMIT_BYTES + 1, b"\0")


def unpack_run_state(size: int, field: bytes) -> str:
    """Return the name of ``size`` bytes, including its NUL, at the start of ``field``.

    Raises:
        DataError: no such name is there.
    """
    name = field[:size]
    if (
        not 1 < size <= len(field)
        or not name.endswith(b"\0")
        or b"\0" in name[:-1]
        or not name[:-1].isascii()
    ):
        raise DataError("the globalstate section's state name is malformed")
    return name[:-1].decode("ascii")


def make_global_state(state: str, *, section_id: int, footer: bool = True) -> DeviceSection:
    """Build a ``globalstate`` section that stores a run state.

    Raises:
        UsageError: the state's name is empty, too long or not ASCII.
    """
    size, name = pack_run_state(state)
    return make_section(
        section_id=section_id,
        idstr=GLOBAL_STATE_IDSTR,
        instance_id=0,
        version_id=1,
        payload=(_U32.pack(size) + name).ljust(GLOBAL_STATE_BYTES, b"\0"),
        footer=footer,
    )


def with_run_state(section: DeviceSection, state: str) -> DeviceSection:
    """Copy the ``globalstate`` section with another run state.

    A restored VM starts by itself only if ``running`` is stored; any other state becomes its run
    state.

    Raises:
        DataError: ``section`` is not a globalstate section of 104 bytes.
        UsageError: the state's name is empty, too long or not ASCII.
    """
    _check_global_state(section)
    size, name = pack_run_state(state)
    # Since QEMU 9.0 other fields follow the name's 32 bytes: keep them.
    payload = _U32.pack(size) + name + section.payload[4 + len(name) :]
    return make_section(
        section_id=section.section_id,
        idstr=section.idstr,
        instance_id=section.instance_id,
        version_id=section.version_id,
        payload=payload,
        footer=section.has_footer,
    )


def _check_global_state(section: DeviceSection) -> None:
    if section.idstr != GLOBAL_STATE_IDSTR or len(section.payload) != GLOBAL_STATE_BYTES:
        raise DataError(
            f"section '{section.idstr}' is not a globalstate section",
            why=f"it has {len(section.payload)} bytes, not {GLOBAL_STATE_BYTES}",
        )
    (size,) = _U32.unpack_from(section.payload)
    if not 1 < size <= GLOBAL_STATE_BYTES - 4:
        raise DataError(f"the globalstate section has a state name of {size} bytes")


def describe(sections: Sequence[DeviceSection], *, target_page_bytes: int) -> dict[str, Any]:
    """Build a vmdescription of these sections, with one ``buffer`` field for each payload.

    ``xen-save-devices-state`` writes no description. Given this one, QEMU's loader prints no
    warning and QEMU's ``scripts/analyze-migration.py`` reads the file to its end.
    """
    return {
        "page_size": target_page_bytes,
        "devices": [
            {
                "name": section.idstr,
                "instance_id": section.instance_id,
                "vmsd_name": section.idstr,
                "version": section.version_id,
                "fields": [{"name": "data", "type": "buffer", "size": len(section.payload)}],
            }
            for section in sections
        ],
    }
