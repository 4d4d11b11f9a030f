"""Export as an ELF64 core for gdb, readelf, crash and drgn.

It has one PT_NOTE with the vCPUs and a Linux guest's VMCOREINFO, and one PT_LOAD for each range of
guest-physical memory. As with QEMU's ``dump-guest-memory`` without paging, ``p_paddr`` is the
guest-physical address and ``p_vaddr`` is 0 (QEMU ``dump/dump.c``; formats: ``man 5 elf``).
"""

from __future__ import annotations

import struct
from typing import Final

from stillframe.errors import DataError, UsageError
from stillframe.still.elf_notes import prstatus_note, qemu_note
from stillframe.still.extents import Extent, physical_extents, write_extents
from stillframe.still.sinks import Sink
from stillframe.still.skeleton import Skeleton, machine_type_of, saved_kind
from stillframe.still.snapshot import Snapshot
from stillframe.still.vmcoreinfo import find_vmcoreinfo
from stillframe.vmstate.x86_cpu import CPU_IDSTR, X86CpuState, parse_x86_cpu

_EHDR = struct.Struct("<16sHHIQQQIHHHHHH")
_PHDR = struct.Struct("<IIQQQQQQ")
_IDENT = b"\x7fELF" + bytes((2, 1, 1))  # 64 bit, little-endian, version 1
_ET_CORE = 4
_EM_X86_64 = 62
_PT_LOAD = 1
_PT_NOTE = 4
_PHDRS_MAX = 0xFFFE
_ALIGN: Final = 4096


def export_elf(snapshot: Snapshot, sink: Sink) -> None:
    """Write an ELF core, and commit the sink. Zero pages become holes if the sink supports them.

    Raises:
        UsageError: the snapshot does not record the guest-physical layout, or is not of an x86-64
            VM.
        DataError: the snapshot is damaged.
        SinkError: the destination cannot take it.
    """
    try:
        parts = physical_extents(snapshot)
        if len(parts) >= _PHDRS_MAX:
            raise DataError(f"the memory map has {len(parts)} parts")
        skeleton = snapshot.skeleton()
        cpus = vcpus(skeleton)
        notes = b"".join(prstatus_note(cpu, number) for number, cpu in enumerate(cpus, 1))
        notes += b"".join(map(qemu_note, cpus))
        if saved_kind(machine_type_of(skeleton)) is None:
            notes += find_vmcoreinfo(snapshot, skeleton.devices, cpus, parts) or b""
        prefix, extents = _layout(parts, notes)
        write_extents(snapshot, sink, extents, prefix=prefix)
    finally:
        sink.abort()


def vcpus(skeleton: Skeleton) -> list[X86CpuState]:
    """Return the vCPUs' registers in the order of their numbers.

    Raises:
        UsageError: there is no x86-64 vCPU.
    """
    sections = [s for s in skeleton.devices if s.idstr == CPU_IDSTR]
    sections.sort(key=lambda section: section.instance_id)
    kind = saved_kind(machine_type_of(skeleton))
    parse = parse_x86_cpu if kind is None else kind.parse_cpu
    try:
        found = [parse(section.payload, section.version_id) for section in sections]
    except DataError as error:
        raise UsageError(
            "the snapshot is not of an x86-64 VM", why=str(error), remedy="export it as raw"
        ) from error
    if not found:
        raise UsageError("the snapshot has no known vCPU state", remedy="export it as raw")
    return found


def _layout(parts: list[Extent], notes: bytes) -> tuple[bytes, list[Extent]]:
    """Return headers and notes, and the extents that follow them.

    Args:
        parts: extents whose file offset is their guest-physical address.
    """
    count = 1 + len(parts)
    notes_offset = _EHDR.size + count * _PHDR.size
    headers = [
        _EHDR.pack(
            *(_IDENT, _ET_CORE, _EM_X86_64, 1, 0, _EHDR.size, 0, 0),
            *(_EHDR.size, _PHDR.size, count, 0, 0, 0),
        ),
        _PHDR.pack(_PT_NOTE, 0, notes_offset, 0, 0, len(notes), len(notes), 0),
    ]
    offset = -(-(notes_offset + len(notes)) // _ALIGN) * _ALIGN
    extents: list[Extent] = []
    for part in parts:
        gpa, length = part.file_offset, part.length_bytes
        headers.append(_PHDR.pack(_PT_LOAD, 0, offset, 0, gpa, length, length, 0))
        extents.append(part._replace(file_offset=offset))
        offset += -(-length // _ALIGN) * _ALIGN
    return b"".join(headers) + notes, extents
