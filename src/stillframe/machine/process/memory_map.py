"""The guest-physical layout of RAM blocks, from the monitor's ``info mtree -f``.

The flat view of the address space "memory" shows what a CPU sees, region by region (QEMU
``system/memory.c``: mtree_print_flatview). A region has QEMU's name: for main RAM the block's
idstr, for device RAM the idstr's last part.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence

import msgspec

from stillframe.model import GpaRange, RamBlock
from stillframe.qmp.client import QmpClient

_SYSTEM_SPACE = 'AS "memory", root: '

# " KVM" follows once for each address space in which the accelerator has the range.
_RANGE = re.compile(
    r"\s+(?P<first>[0-9a-f]{8,16})-(?P<last>[0-9a-f]{8,16}) \(prio -?\d+, (?:nv-)?"
    r"(?P<kind>ram|rom|romd)\): (?P<name>.*?)(?: @(?P<offset>[0-9a-f]{8,16}))?(?: KVM)*\s*"
)
_GPA2HVA = re.compile(r"Host virtual address for 0x[0-9a-f]+ \((?P<name>.*)\) is 0x(?P<hva>\w+)")


class FlatRange(msgspec.Struct, frozen=True):
    """One RAM or ROM range of the flat view; ``region`` is QEMU's region name, not an idstr."""

    gpa: int
    length_bytes: int
    region: str
    offset_bytes: int


def flat_ranges(text: str) -> list[FlatRange]:
    """Return the RAM and ROM ranges of the CPU's address space in ``info mtree -f``, ascending."""
    for view in text.split("\nFlatView #"):
        if _SYSTEM_SPACE not in view:
            continue
        found: list[FlatRange] = []
        for line in view.splitlines():
            match = _RANGE.fullmatch(line)
            if match is None:
                continue
            first, last = int(match["first"], 16), int(match["last"], 16)
            offset = int(match["offset"], 16) if match["offset"] else 0
            found.append(FlatRange(first, last - first + 1, match["name"], offset))
        return sorted(found, key=lambda flat: flat.gpa)
    return []


def names_of_regions(regions: Iterable[str], idstrs: Sequence[str]) -> dict[str, str]:
    """Map region names to idstrs where that is certain: the same name, or the only idstr ending in
    it."""
    known = set(idstrs)
    names: dict[str, str] = {}
    for region in set(regions):
        owned = [idstr for idstr in idstrs if idstr.endswith("/" + region)]
        if region in known and not owned:
            names[region] = region
        elif region not in known and len(owned) == 1:
            names[region] = owned[0]
    return names


def host_address(qmp: QmpClient, gpa: int) -> tuple[str, int] | None:
    """Return the region name and host virtual address behind a guest-physical address, or None.

    Raises:
        MachineError: the monitor went away.
    """
    match = _GPA2HVA.search(qmp.hmp(f"gpa2hva {gpa:#x}"))
    return (match["name"], int(match["hva"], 16)) if match else None


def read_memory_map(qmp: QmpClient, blocks: Sequence[RamBlock]) -> tuple[GpaRange, ...]:
    """Return where the guest sees its RAM blocks now, ascending, without parts that no block owns.

    The guest may see a block in several places (the BIOS), or in none (an unmapped ROM).

    Raises:
        MachineError: the monitor went away.
    """
    flats = flat_ranges(qmp.hmp("info mtree -f"))
    names = names_of_regions((flat.region for flat in flats), [b.idstr for b in blocks])
    by_idstr = {block.idstr: block for block in blocks}
    ranges: list[GpaRange] = []
    for flat in flats:
        idstr = names.get(flat.region)
        block = by_idstr.get(idstr) if idstr else _block_behind(qmp, flat, blocks)
        if block is None:
            continue
        length = min(flat.length_bytes, block.used_length_bytes - flat.offset_bytes)
        if length > 0:
            ranges.append(
                GpaRange(
                    gpa=flat.gpa,
                    length_bytes=length,
                    idstr=block.idstr,
                    offset_bytes=flat.offset_bytes,
                )
            )
    return tuple(ranges)


def _block_behind(qmp: QmpClient, flat: FlatRange, blocks: Sequence[RamBlock]) -> RamBlock | None:
    """Return the block that a region with an ambiguous name belongs to, by its host address."""
    answer = host_address(qmp, flat.gpa)
    if answer is None:
        return None
    start = answer[1] - flat.offset_bytes
    return next((block for block in blocks if block.hva == start), None)
