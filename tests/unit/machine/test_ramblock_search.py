"""Blocks by the shape of their mappings: certain, or refused."""

from __future__ import annotations

import os
from typing import Any

import pytest

from stillframe.errors import RefusedError
from stillframe.kernel.proc_maps import Vma
from stillframe.machine.process.ramblock_text import MonitorBlock
from stillframe.machine.qemu import ramblock_search
from stillframe.machine.qemu.ramblock_search import search_blocks

MIB = 1 << 20


class Monitor:
    """Shows nothing of the guest's memory map, so that only shapes are left."""

    def hmp(self, _line: str) -> str:
        return ""


def block(name: str, length: int) -> MonitorBlock:
    return MonitorBlock(
        name=name,
        page_size_bytes=4096,
        ram_addr=0,
        used_length_bytes=length,
        max_length_bytes=length,
        hva=None,
    )


def vma(start: int, length: int) -> Vma:
    return Vma(start, start + length, True, True, False, 0, (0, 0), 0, "")


def search(
    monkeypatch: pytest.MonkeyPatch, blocks: list[MonitorBlock], vmas: list[Vma], *roms: int
) -> list[int]:
    monkeypatch.setattr(ramblock_search, "_candidates", lambda _pid: vmas)
    monkeypatch.setattr(ramblock_search, "_is_option_rom", lambda _pid, start: start in roms)
    monitor: Any = Monitor()
    return search_blocks(os.getpid(), monitor, blocks)


def test_the_only_mapping_of_a_length(monkeypatch: pytest.MonkeyPatch) -> None:
    blocks = [block("pc.ram", 64 * MIB), block("", MIB), block("v", 16 * MIB)]
    vmas = [vma(0x10000000, 16 * MIB), vma(0x20000000, 64 * MIB), vma(0x30000000, 8 * MIB)]
    assert search(monkeypatch, blocks, vmas) == [0x20000000, 0, 0x10000000]


def test_a_rom_is_told_by_its_signature(monkeypatch: pytest.MonkeyPatch) -> None:
    blocks = [block("/rom@etc/table-loader", 65536), block("0000:00:02.0/vga.rom", 65536)]
    vmas = [vma(0x10000000, 65536), vma(0x20000000, 65536)]
    assert search(monkeypatch, blocks, vmas, 0x10000000) == [0x20000000, 0x10000000]


@pytest.mark.parametrize(
    "starts", [[], [0x10000000, 0x20000000]], ids=["no mapping", "two mappings"]
)
def test_doubt_is_refused(monkeypatch: pytest.MonkeyPatch, starts: list[int]) -> None:
    with pytest.raises(RefusedError, match=r"pc\.ram"):
        search(monkeypatch, [block("pc.ram", MIB)], [vma(start, MIB) for start in starts])


def test_two_roms_of_one_length_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    blocks = [block("1/a.rom", 65536), block("2/b.rom", 65536)]
    vmas = [vma(0x10000000, 65536), vma(0x20000000, 65536)]
    with pytest.raises(RefusedError, match=r"1/a\.rom, 2/b\.rom"):
        search(monkeypatch, blocks, vmas, 0x10000000, 0x20000000)
