"""Where RAM is, by what a stream holds."""

from __future__ import annotations

import struct

import pytest

from stillframe.errors import UsageError
from stillframe.still.pc_layout import find_memory_map
from stillframe.vmstate.devices import DeviceSection, make_section
from tests.support_store.small import block_records, clock

MIB, GIB = 1 << 20, 1 << 30
DEVICE_BLOCKS = {
    "0000:00:02.0/vga.vram": 16 * MIB,
    "pc.bios": 256 << 10,
    "pc.rom": 128 << 10,
    "vga.vram": 8 * MIB,
    "system.flash0": 4 * MIB,
    "/rom@etc/acpi/tables": 2 * MIB,
}


def places(
    blocks: dict[str, int],
    *devices: DeviceSection,
    machine_type: str = "pc-q35-7.2",
    nodes: tuple[int, ...] = (),
) -> list[tuple[int, str, int, int]]:
    found = find_memory_map(
        machine_type, block_records((blocks | DEVICE_BLOCKS).items()), devices, srat(*nodes)
    )
    return [(p.gpa, p.idstr, p.offset_bytes, p.length_bytes) for p in found]


def srat(*nodes: int) -> bytes:
    """As QEMU builds it: without the hole below 1 MiB, and an entry for memory to be plugged."""
    entries, base = [], 0
    for number, size in enumerate(nodes):
        if base == 0:
            entries.append((number, 0, 640 << 10, 1))
            entries.append((number, MIB, size - MIB, 1))
        else:
            entries.append((number, base, size, 1))
        base += size
    entries.append((0, 0x100000000, 8 * GIB, 3))
    body = b"".join(
        struct.pack("<BBI2xQQ4xI8x", 1, 40, node, base, size, flags)
        for node, base, size, flags in entries
    )
    cpus = struct.pack("<BB14x", 0, 16) * 2
    table = b"SRAT" + struct.pack("<I", 48 + len(cpus + body)) + bytes(40) + cpus + body
    return b"FACP...." + (table if nodes else b"") + bytes(100)


@pytest.mark.parametrize("machine_type", ["pc-q35-9.2", "pc-i440fx-2.4", "microvm", "isapc", ""])
def test_one_block_and_the_split_of_its_cmos(machine_type: str) -> None:
    """And not the one that the machine type has if ``max-ram-below-4g`` is not given."""
    found = places({"pc.ram": 4 * GIB}, clock(GIB, 3 * GIB), machine_type=machine_type)
    assert found == [(0, "pc.ram", 0, GIB), (4 * GIB, "pc.ram", GIB, 3 * GIB)]


@pytest.mark.parametrize("size", [2 * MIB, 16 * MIB, 17 * MIB, 255 * MIB, 3 * GIB])
def test_small_ram(size: int) -> None:
    assert places({"ram0": size}, clock(size)) == [(0, "ram0", 0, size)]


def test_nodes_of_libvirt() -> None:
    blocks = {"ram-node10": GIB, "ram-node2": GIB, "ram-node0": 2 * GIB}
    assert places(blocks, clock(3 * GIB, GIB)) == [
        (0, "ram-node0", 0, 2 * GIB),
        (2 * GIB, "ram-node2", 0, GIB),
        (4 * GIB, "ram-node10", 0, GIB),
    ]


def test_nodes_of_different_sizes() -> None:
    sizes = (256 * MIB, 2 * GIB, 512 * MIB)
    blocks = {"a": 2 * GIB, "/objects/b": 512 * MIB, "c": 256 * MIB}
    assert places(blocks, clock(GIB, sum(sizes) - GIB), nodes=sizes) == [
        (0, "c", 0, 256 * MIB),
        (256 * MIB, "a", 0, 768 * MIB),
        (4 * GIB, "a", 768 * MIB, 2 * GIB - 768 * MIB),
        (4 * GIB + 2 * GIB - 768 * MIB, "/objects/b", 0, 512 * MIB),
    ]


def virtio_mem(name: str, payload: bytes) -> DeviceSection:
    return make_section(
        section_id=20, idstr=f"0000:00:03.0/{name}", instance_id=0, version_id=1, payload=payload
    )


@pytest.mark.parametrize("name", ["virtio-mem-device-early", "virtio-mem"])
def test_virtio_mem_is_where_its_state_says(name: str) -> None:
    place = struct.pack(">QQQI", 0x140000000, GIB, 2 * MIB, 0)
    device = virtio_mem(name, b"other fields" + place + bytes(100))
    assert places({"r": GIB, "0000:00:03.0/vm0": GIB}, clock(GIB), device) == [
        (0, "r", 0, GIB),
        (0x140000000, "0000:00:03.0/vm0", 0, GIB),
    ]


REFUSED = [
    ({"m0": GIB, "m1": GIB}, (clock(2 * GIB),), (GIB, GIB), "which of the blocks m0 of 1024 MiB"),
    ({"m0": GIB, "m1": 2 * GIB}, (clock(3 * GIB),), (), "which of the blocks"),
    ({"pc.ram": GIB, "m1": 2 * GIB}, (clock(GIB),), (GIB,), "m1 of 2048 MiB: one may be a DIMM"),
    ({"ram-node0": GIB, "memdimm0": GIB}, (clock(GIB),), (GIB,), "memdimm0"),
    ({"pc.ram": GIB}, (clock(2 * GIB),), (), "pc.ram of 1024 MiB"),
    ({"pc.ram": GIB}, (), (), "no CMOS"),
    ({"pc.ram": 600 * GIB}, (clock(2 * GIB, 598 * GIB),), (), "512 GiB"),
    (
        {"pc.ram": GIB, "0000:00:03.0/vm0": GIB},
        (clock(GIB), virtio_mem("virtio-mem", b"nothing")),
        (),
        "virtio-mem 0000:00:03.0/vm0",
    ),
]


@pytest.mark.parametrize(("blocks", "devices", "nodes", "why"), REFUSED)
def test_refused_by_name(
    blocks: dict[str, int], devices: tuple[DeviceSection, ...], nodes: tuple[int, ...], why: str
) -> None:
    with pytest.raises(UsageError, match=why):
        places(blocks, *devices, nodes=nodes)


def test_machine_that_is_no_pc() -> None:
    with pytest.raises(UsageError, match=r"virt-9\.0 is not known"):
        places({"mach-virt.ram": GIB}, clock(GIB), machine_type="virt-9.0")


def test_damaged_tables_are_no_nodes() -> None:
    tables = srat(GIB, 2 * GIB)
    start = tables.index(b"SRAT")
    blocks = block_records({"a": GIB, "b": 2 * GIB}.items())
    for cut in range(start, len(tables) - 160, 7):
        with pytest.raises(UsageError, match="which of the blocks"):
            find_memory_map("pc-q35-7.2", blocks, [clock(3 * GIB)], tables[:cut])
