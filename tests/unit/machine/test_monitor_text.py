"""What the human monitor prints, of several versions, and what must not be taken for it."""

from __future__ import annotations

import pytest

from stillframe.machine.process.memory_map import flat_ranges, names_of_regions, read_memory_map
from stillframe.machine.process.ramblock_text import parse_info_ramblock
from stillframe.model import RamBlock

OLD = """\
              Block Name    PSize              Offset               Used              Total
                  pc.ram    4 KiB  0x0000000000000000 0x0000000008000000 0x0000000008000000
0000:00:03.0/bochs-display-vram    4 KiB  0x00000000108c0000 0x0000000001000000 0x0000000001000000
    /rom@etc/acpi/tables    4 KiB  0x0000000011900000 0x0000000000020000 0x0000000000200000
                    huge    2 MiB  0x0000000010000000 0x0000000000040000 0x0000000000040000
                            4 KiB  0x0000000010040000 0x0000000000020000 0x0000000000020000
"""
NEW = """\
              Block Name    PSize              Offset               Used              Total                HVA  RO
                  pc.ram    4 KiB  0x0000000000000000 0x0000000004000000 0x0000000004000000 0x00007f231fe00000  rw
                 pc.bios    4 KiB  0x0000000004000000 0x0000000000040000 0x0000000000040000 0x00007f2371c00000  ro
                    giga    1 GiB  0x0000000044000000 0x0000000000040000 0x0000000000040000 0x00007f2471c00000  rw
"""  # noqa: E501


def test_ramblock_before_8_0() -> None:
    blocks = parse_info_ramblock(OLD)
    assert [block.name for block in blocks] == [
        "pc.ram",
        "0000:00:03.0/bochs-display-vram",
        "/rom@etc/acpi/tables",
        "huge",
        "",
    ]
    tables = blocks[2]
    assert tables.used_length_bytes == 0x20000
    assert tables.max_length_bytes == 0x200000
    assert tables.ram_addr == 0x11900000
    assert [block.page_size_bytes for block in blocks] == [4096, 4096, 4096, 2 << 20, 4096]
    assert all(block.hva is None for block in blocks)


def test_ramblock_since_8_0() -> None:
    blocks = parse_info_ramblock(NEW)
    assert [(block.name, block.hva) for block in blocks] == [
        ("pc.ram", 0x7F231FE00000),
        ("pc.bios", 0x7F2371C00000),
        ("giga", 0x7F2471C00000),
    ]
    assert blocks[2].page_size_bytes == 1 << 30


@pytest.mark.parametrize("text", ["", "\0", "unknown command: 'info ramblock'", "x" * 100_000])
def test_other_text_has_no_blocks(text: str) -> None:
    assert parse_info_ramblock(text) == []


MTREE = """\
FlatView #0
 AS "I/O", root: io
 Root memory region: io
  0000000000000000-0000000000000fff (prio 0, ram): decoy

FlatView #1
 AS "memory", root: system
 AS "cpu-memory-0", root: system
 Root memory region: system
  0000000000000000-000000000009ffff (prio 0, ram): pc.ram KVM
  00000000000a0000-00000000000bffff (prio 1, i/o): vga-lowmem
  00000000000c0000-00000000000dffff (prio 1, rom): pc.rom
  0000000000100000-00000000bfffffff (prio 0, ram): pc.ram @0000000000100000 KVM KVM
  00000000fd000000-00000000fdffffff (prio 1, ram): vga.vram
  00000000fe000000-00000000fe000fff (prio 1, ramd): 0000:01:00.0 BAR 0 mmaps[0]
  00000000ffc00000-00000000ffffffff (prio 0, romd): system.flash0
  0000000100000000-000000013fffffff (prio 0, nv-ram): nv0 @0000000000000000
  0000000140000000-000000017fffffff (prio -1, ram): pc.ram @00000000c0000000

FlatView #2
 AS "cpu-smm-0", root: memory
  0000000000000000-0000000000000fff (prio 0, ram): decoy
"""


def test_flat_view_of_the_system() -> None:
    assert [
        (flat.gpa, flat.length_bytes, flat.region, flat.offset_bytes) for flat in flat_ranges(MTREE)
    ] == [
        (0, 0xA0000, "pc.ram", 0),
        (0xC0000, 0x20000, "pc.rom", 0),
        (0x100000, 0xBFF00000, "pc.ram", 0x100000),
        (0xFD000000, 0x1000000, "vga.vram", 0),
        (0xFFC00000, 0x400000, "system.flash0", 0),
        (0x100000000, 0x40000000, "nv0", 0),
        (0x140000000, 0x40000000, "pc.ram", 0xC0000000),
    ]


@pytest.mark.parametrize("text", ["", 'FlatView #0\n AS "I/O", root: io\n', "nonsense"])
def test_no_flat_view(text: str) -> None:
    assert flat_ranges(text) == []


def test_region_names() -> None:
    idstrs = ["pc.ram", "a/vga.vram", "b/rom", "c/rom", "mem", "d/mem"]
    assert names_of_regions(["pc.ram", "vga.vram", "rom", "mem", "none"], idstrs) == {
        "pc.ram": "pc.ram",
        "vga.vram": "a/vga.vram",
    }


class Monitor:
    def __init__(self, answers: dict[str, str]) -> None:
        self._answers = answers

    def hmp(self, line: str) -> str:
        return self._answers.get(line, "No memory is mapped at address\n")


def block(idstr: str, hva: int, length: int) -> RamBlock:
    return RamBlock(
        idstr=idstr,
        hva=hva,
        used_length_bytes=length,
        max_length_bytes=length,
        page_size_bytes=4096,
    )


def test_a_doubtful_region_is_asked_for_by_address_and_lengths_are_clipped() -> None:
    text = (
        'FlatView #0\n AS "memory", root: system\n'
        "  0000000000000000-000000000000ffff (prio 0, ram): pc.ram\n"
        "  00000000fd000000-00000000fd00ffff (prio 1, ram): vga.vram\n"
        "  00000000fe000000-00000000fe000fff (prio 1, ram): vga.vram @0000000000001000\n"
        "  00000000ff000000-00000000ff000fff (prio 1, ram): stranger\n"
    )
    monitor = Monitor(
        {
            "info mtree -f": text,
            "gpa2hva 0xfd000000": "Host virtual address for 0xfd000000 (vga.vram) is 0x20000\n",
            "gpa2hva 0xfe000000": "Host virtual address for 0xfe000000 (vga.vram) is 0x11000\n",
        }
    )
    blocks = [
        block("pc.ram", 0x500000, 0x8000),
        block("1/vga.vram", 0x10000, 0x10000),
        block("2/vga.vram", 0x20000, 0x10000),
    ]
    ranges = read_memory_map(monitor, blocks)  # type: ignore[arg-type]
    assert [(run.gpa, run.length_bytes, run.idstr, run.offset_bytes) for run in ranges] == [
        (0, 0x8000, "pc.ram", 0),
        (0xFD000000, 0x10000, "2/vga.vram", 0),
        (0xFE000000, 0x1000, "1/vga.vram", 0x1000),
    ]
