"""The search for a Linux guest's VMCOREINFO note, by which drgn and crash identify the kernel.

Linux ``kernel/vmcore_info.c`` keeps it as a complete ELF note at the start of a page. A guest with
``-device vmcoreinfo`` announces its address (QEMU ``hw/misc/vmcoreinfo.c``, Linux
``drivers/firmware/qemu_fw_cfg.c``); otherwise RAM is searched.
"""

from __future__ import annotations

import re
import struct
from collections.abc import Iterable, Iterator, Sequence
from typing import Final

from stillframe.errors import NotFoundError
from stillframe.still.extents import Extent
from stillframe.still.index import KIND_DATA
from stillframe.still.records import record_bytes
from stillframe.still.snapshot import Snapshot
from stillframe.vmstate.devices import DeviceSection, find_section
from stillframe.vmstate.x86_cpu import X86CpuState

_NAME: Final = b"VMCOREINFO\0\0"
_HEAD = struct.Struct("<III")
_NOTE_LIMIT_BYTES: Final = 1 << 20
"""QEMU's ``MAX_GUEST_NOTE_SIZE`` (``dump/dump.c``)."""
_DEVICE = struct.Struct(">?HHIQ")
"""Whether the guest set it, host format, guest format, size, address."""
_FORMAT_ELF: Final = 1
_START = re.compile(rb"\x0b\0\0\0(?=..\0\0\0\0\0\0VMCOREINFO\0\0OSRELEASE=)", re.DOTALL)
_TEXT = re.compile(rb"^SYMBOL\(_stext\)=([0-9a-f]+)$", re.MULTILINE)
_TEXT_LIMIT_BYTES: Final = 64 << 20
"""Kernel text is smaller."""


def find_vmcoreinfo(
    snapshot: Snapshot,
    devices: Sequence[DeviceSection],
    cpus: Sequence[X86CpuState],
    extents: Sequence[Extent],
) -> bytes | None:
    """Return the note including its header; None if the guest has none.

    Args:
        extents: where RAM is; the file offset is the guest-physical address.

    Raises:
        DataError: the snapshot is damaged.
    """
    section = find_section(devices, "vmcoreinfo")
    if section is not None and len(section.payload) == _DEVICE.size:
        given, _, guest_format, size, gpa = _DEVICE.unpack(section.payload)
        if given and guest_format == _FORMAT_ELF and 0 < size <= _NOTE_LIMIT_BYTES:
            note = _whole_note(_read_physical(snapshot, extents, gpa, size))
            if note is not None:
                return note
    syscall_entries = {cpu.lstar for cpu in cpus}
    for idstr in dict.fromkeys(extent.idstr for extent in extents):
        for note in _notes_in(snapshot, idstr):
            if _is_of_kernel(note, syscall_entries):
                return note
    return None


def _notes_in(snapshot: Snapshot, idstr: str) -> Iterator[bytes]:
    """Yield what looks like the note, at the start of any page of a block."""
    page_bytes = snapshot.index.target_page_bytes
    stride = record_bytes(KIND_DATA, page_bytes)
    for run, content in snapshot.iter_runs(idstr):
        if content is None:
            continue
        for match in _START.finditer(content):
            if match.start() % stride == 0:
                # The note hardly exceeds a page: Linux allows one (VMCOREINFO_BYTES).
                start = (run.first_page + match.start() // stride) * page_bytes
                size = snapshot.blocks[run.block].used_length_bytes - start
                note = _whole_note(_read(snapshot, idstr, start, min(size, 2 * page_bytes)))
                if note is not None:
                    yield note


def _is_of_kernel(note: bytes, syscall_entries: Iterable[int]) -> bool:
    """Return whether the running kernel wrote it, not one before a reboot: the kernel's text holds
    the system call entry (MSR_LSTAR)."""
    match = _TEXT.search(note)
    if match is None:
        return False
    text = int(match[1], 16)
    return any(text <= entry < text + _TEXT_LIMIT_BYTES for entry in syscall_entries)


def _whole_note(data: bytes | None) -> bytes | None:
    """Return the note at the start of ``data``; None if there is none."""
    if data is None or len(data) < _HEAD.size:
        return None
    name_bytes, content_bytes, kind = _HEAD.unpack_from(data)
    end = _HEAD.size + len(_NAME) + -(-content_bytes // 4) * 4
    if (name_bytes, kind) != (len(_NAME) - 1, 0) or end > len(data):
        return None
    return data[:end] if data[_HEAD.size :].startswith(_NAME) else None


def _read_physical(
    snapshot: Snapshot, extents: Sequence[Extent], gpa: int, size: int
) -> bytes | None:
    for extent in extents:
        offset = gpa - extent.file_offset
        if 0 <= offset <= extent.length_bytes - size:
            return _read(snapshot, extent.idstr, extent.block_offset + offset, size)
    return None


def _read(snapshot: Snapshot, idstr: str, offset_bytes: int, size: int) -> bytes | None:
    """Return bytes of a block; None if the snapshot does not hold them."""
    try:
        return snapshot.read_range(idstr, offset_bytes, size)
    except NotFoundError:
        return None
