"""A search for RAM blocks by the shape of their mappings, for a QEMU that neither exports nor
prints them.

Every block that QEMU allocates is a mapping of exactly its maximal length, writable, not copied on
fork (VmFlags ``dc``), with an inaccessible page behind it (``util/mmap-alloc.c``: qemu_ram_mmap).
``gpa2hva`` locates the blocks that the guest sees now; each other block must be the only mapping of
its length. Anything else is refused: a guess could snapshot the wrong memory.
"""

from __future__ import annotations

import itertools
from pathlib import Path

from stillframe.errors import RefusedError
from stillframe.kernel.proc_maps import Vma, proc_error, read_smaps
from stillframe.machine.process.memory_map import flat_ranges, host_address, names_of_regions
from stillframe.machine.process.ramblock_text import MonitorBlock
from stillframe.qmp.client import QmpClient

_GUARD_BYTES = 4096
_ANONYMOUS_ALIGN_BYTES = 2 << 20


def search_blocks(pid: int, qmp: QmpClient, blocks: list[MonitorBlock]) -> list[int]:
    """Return the host virtual address of each block, in the given order (0 for an unnamed block).

    Raises:
        RefusedError: a block is not found, or is ambiguous.
        MachineError, HostError: the monitor or ``/proc`` is out of reach.
    """
    candidates = _candidates(pid)
    found = _anchors(qmp, blocks, candidates)
    missing: list[str] = []
    for length in {block.max_length_bytes for block in blocks}:
        names = [b.name for b in blocks if b.max_length_bytes == length and b.name]
        left = [name for name in names if name not in found]
        taken = {found[name] for name in names if name in found}
        free = [v.start for v in candidates if v.length_bytes == length and v.start not in taken]
        pairs = _pair(pid, left, free)
        found.update(pairs)
        missing += [name for name in left if name not in pairs]
    if missing:
        raise RefusedError(
            f"cannot tell where the VM's RAM blocks lie: {', '.join(sorted(missing))}",
            why="this QEMU neither exports ram_list nor prints host addresses",
            remedy="use a QEMU from 8.0 on, or one built with modules",
        )
    return [found.get(block.name, 0) for block in blocks]


def _pair(pid: int, names: list[str], starts: list[int]) -> dict[str, int]:
    """Match blocks and mappings of one length where that is certain.

    The first two bytes distinguish a PCI option ROM from other blocks (PCI Firmware Specification).
    """
    roms = [name for name in names if name.endswith(".rom") and "/" in name]
    others = [name for name in names if name not in roms]
    if not roms or not others:
        return {names[0]: starts[0]} if len(names) == len(starts) == 1 else {}
    rom_starts = [start for start in starts if _is_option_rom(pid, start)]
    return _pair(pid, roms, rom_starts) | _pair(
        pid, others, [start for start in starts if start not in rom_starts]
    )


def _is_option_rom(pid: int, start: int) -> bool:
    try:
        with Path(f"/proc/{pid}/mem").open("rb", buffering=0) as memory:
            memory.seek(start)
            return memory.read(2) == b"\x55\xaa"
    except OSError as error:
        raise proc_error(pid, "the memory", error) from error


def _candidates(pid: int) -> list[Vma]:
    details = list(read_smaps(pid))
    found: list[Vma] = []
    for detail, after in itertools.pairwise(details):
        vma, guard = detail.vma, after.vma
        fenced = (
            guard.start == vma.end
            and guard.length_bytes >= _GUARD_BYTES
            and not (guard.readable or guard.writable)
        )
        aligned = vma.inode != 0 or vma.start % _ANONYMOUS_ALIGN_BYTES == 0
        if vma.writable and fenced and aligned and "dc" in detail.flags:
            found.append(vma)
    return found


def _anchors(qmp: QmpClient, blocks: list[MonitorBlock], candidates: list[Vma]) -> dict[str, int]:
    """Return the start of each block that the guest sees now, by ``gpa2hva``, checked against a
    mapping."""
    starts = {(vma.start, vma.length_bytes) for vma in candidates}
    by_name = {block.name: block for block in blocks}
    flats = flat_ranges(qmp.hmp("info mtree -f"))
    names = names_of_regions((flat.region for flat in flats), list(by_name))
    found: dict[str, int] = {}
    for flat in flats:
        name = names.get(flat.region)
        if name is None or name in found:
            continue
        answer = host_address(qmp, flat.gpa)
        if answer is None or answer[0] != flat.region:
            continue
        start = answer[1] - flat.offset_bytes
        if (start, by_name[name].max_length_bytes) in starts:
            found[name] = start
    return found
