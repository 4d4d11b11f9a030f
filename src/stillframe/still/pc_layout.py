"""Where a stream's RAM blocks are in guest-physical memory: streams name blocks, not addresses.

A PC's split around 4 GiB is in its CMOS, NUMA nodes are in its ACPI tables, and a virtio-mem's
address is in its own state. Sources: QEMU ``hw/i386/pc.c`` (``pc_cmos_init``, ``pc_memory_init``),
``hw/i386/acpi-build.c`` (``build_srat``), ``hw/core/numa.c``, ``hw/virtio/virtio-mem.c``.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from struct import Struct
from typing import Final

from stillframe.errors import UsageError
from stillframe.model import BlockRecord, GpaRange
from stillframe.still.skeleton import saved_kind
from stillframe.vmstate.devices import DeviceSection, find_section

ACPI_TABLES_BLOCK: Final = "/rom@etc/acpi/tables"
NO_MAP: Final = "no memory map: "
"""Start of the manifest's note that says why there is no map."""

_GIB_4: Final = 4 << 30
_RAM_MAX_BYTES: Final = 512 << 30
"""Beyond this, RAM above 4 GiB may be elsewhere: AMD hosts keep a hole below 1 TiB."""
_HOLE_BYTES: Final = 0x60000
"""From 640 KiB to 1 MiB: RAM that ACPI does not list."""
_UNIT: Final = 1 << 16

_PC = re.compile(r"pc-(i440fx|q35)-.*|isapc|microvm")
_OF_A_DEVICE = re.compile(r"[0-9a-f]{4}:.*|/rom@.*|(pc|isa)[.-](bios|rom)|vga\..*|system\.flash\d")
_LIBVIRT_NODE = re.compile(r"(?:.*/)?ram-node(\d+)")
_SRAT = Struct("<4sI")
_SRAT_HEAD_BYTES = 48
_AFFINITY = Struct("<BBI2xQQ4xI8x")
_MEMORY_AFFINITY = 1
_ENABLED, _HOTPLUG = 1, 2
_U64 = Struct(">Q")


def find_memory_map(
    machine_type: str, blocks: Sequence[BlockRecord], devices: Sequence[DeviceSection], acpi: bytes
) -> tuple[GpaRange, ...]:
    """Return where all RAM of a PC, a microvm or a wing's machine is.

    Args:
        machine_type: the name in the stream's configuration section.
        blocks: the stream's RAM blocks.
        devices: the stream's device sections.
        acpi: content of the block :data:`ACPI_TABLES_BLOCK`; empty if there is none.

    Raises:
        UsageError: the stream does not say; the message names the block.
    """
    kind = saved_kind(machine_type)
    if kind is not None:
        return kind.memory_map(blocks)
    if machine_type and _PC.fullmatch(machine_type) is None:
        raise UsageError(f"the layout of a {machine_type} is not known")
    pluggable, placed = _virtio_mem(blocks, devices)
    others = [b for b in blocks if b not in pluggable and not _OF_A_DEVICE.fullmatch(b.idstr)]
    below, above = _split(devices)
    ranges: list[GpaRange] = []
    gpa = 0
    for block in _in_order(others, _node_sizes(acpi), below + above):
        first = max(0, min(block.used_length_bytes, below - gpa))
        if first:
            ranges.append(_range(gpa, block, 0, first))
        if first < block.used_length_bytes:
            start = _GIB_4 + max(gpa - below, 0)
            ranges.append(_range(start, block, first, block.used_length_bytes - first))
        gpa += block.used_length_bytes
    return (*ranges, *placed)


def _range(gpa: int, block: BlockRecord, offset_bytes: int, length_bytes: int) -> GpaRange:
    return GpaRange(
        gpa=gpa, length_bytes=length_bytes, idstr=block.idstr, offset_bytes=offset_bytes
    )


def _split(devices: Sequence[DeviceSection]) -> tuple[int, int]:
    """Return the bytes of RAM below and above 4 GiB, as the machine wrote them into the CMOS."""
    section = find_section(devices, "mc146818rtc")
    if section is None or len(section.payload) < 128:
        raise UsageError("the stream has no CMOS, which holds the size of RAM below 4 GiB")
    cmos = section.payload
    below = int.from_bytes(cmos[0x34:0x36], "little") * _UNIT + (16 << 20)
    if below == 16 << 20:  # at most 16 MiB: this field holds KiB above the first MiB
        below = (int.from_bytes(cmos[0x30:0x32], "little") << 10) + (1 << 20)
    return below, int.from_bytes(cmos[0x5B:0x5E], "little") * _UNIT


def _in_order(
    blocks: Sequence[BlockRecord], nodes: Sequence[int], ram_bytes: int
) -> list[BlockRecord]:
    """Return the blocks of the main RAM in address order."""
    total = sum(b.used_length_bytes for b in blocks)
    names = ", ".join(f"{b.idstr} of {b.used_length_bytes >> 20} MiB" for b in blocks)
    if ram_bytes > _RAM_MAX_BYTES:
        raise UsageError("with more than 512 GiB of RAM the layout depends on the host")
    if total // _UNIT != ram_bytes // _UNIT:
        raise UsageError(
            f"the machine has {ram_bytes >> 20} MiB of main RAM, and blocks {names}: one may be a "
            "DIMM, whose address no stream holds"
        )
    if len(blocks) == 1:
        return list(blocks)
    found = {b: _LIBVIRT_NODE.fullmatch(b.idstr) for b in blocks}
    numbers = {b: int(match[1]) for b, match in found.items() if match is not None}
    if len(numbers) == len(blocks):
        return sorted(blocks, key=lambda b: numbers[b])
    by_size = {b.used_length_bytes: b for b in blocks}
    if len(by_size) == len(blocks) == len(nodes) and set(by_size) == set(nodes):
        return [by_size[size] for size in nodes]
    raise UsageError(f"the stream does not say which of the blocks {names} comes first in memory")


def _node_sizes(acpi: bytes) -> list[int]:
    """Return each NUMA node's RAM in bytes, by the SRAT in the ACPI tables; empty without one."""
    start = acpi.find(b"SRAT")
    if start < 0 or start + _SRAT_HEAD_BYTES > len(acpi):
        return []
    _, length = _SRAT.unpack_from(acpi, start)
    sizes: dict[int, int] = {}
    for kind, entry in _srat_entries(acpi[start : start + length]):
        if kind != _MEMORY_AFFINITY or len(entry) != _AFFINITY.size:
            continue
        _, _, node, base, size, flags = _AFFINITY.unpack(entry)
        if flags & (_ENABLED | _HOTPLUG) == _ENABLED and size:
            sizes[node] = sizes.get(node, 0) + size + (_HOLE_BYTES if base == 0 else 0)
    return [sizes[node] for node in sorted(sizes)]


def _srat_entries(table: bytes) -> Iterator[tuple[int, bytes]]:
    position = _SRAT_HEAD_BYTES
    while position + 2 <= len(table) and table[position + 1] >= 2:
        yield table[position], table[position : position + table[position + 1]]
        position += table[position + 1]


def _virtio_mem(
    blocks: Sequence[BlockRecord], devices: Sequence[DeviceSection]
) -> tuple[list[BlockRecord], list[GpaRange]]:
    """Return the blocks of virtio-mem devices and their ranges; a block's name is its device's
    path."""
    found: list[BlockRecord] = []
    placed: list[GpaRange] = []
    for block in blocks:
        path = block.idstr.rpartition("/")[0] + "/"
        own = [d for d in devices if d.idstr.startswith(path) and "virtio-mem" in d.idstr]
        if path == "/" or not own:
            continue
        # Address, region size, block size (a power of two), with other fields around them.
        size = re.escape(_U64.pack(block.used_length_bytes))
        pattern = re.compile(rb"(?s)(.{8})(?=" + size + rb"(.{8}))")
        places = {
            _U64.unpack(match[1])[0]
            for device in own
            for match in pattern.finditer(device.payload)
            if _is_block_size(_U64.unpack(match[2])[0])
        }
        if len(places) != 1:
            raise UsageError(f"the stream does not say where the virtio-mem {block.idstr} is")
        found.append(block)
        placed.append(_range(places.pop(), block, 0, block.used_length_bytes))
    return found, placed


def _is_block_size(value: int) -> bool:
    return value >= 1 << 12 and not value & (value - 1)
