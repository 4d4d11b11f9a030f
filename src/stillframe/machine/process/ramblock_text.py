"""The monitor's ``info ramblock`` as records (QEMU ``system/physmem.c``: ram_block_format)."""

from __future__ import annotations

import re

import msgspec

_UNIT_BYTES = {"B": 1, "KiB": 1 << 10, "MiB": 1 << 20, "GiB": 1 << 30, "TiB": 1 << 40}

# Parsed from the right: a name longer than its column shifts the rest; a block may have no name.
_LINE = re.compile(
    r"\s*(?P<name>.*?)\s+(?P<number>[0-9.]+) (?P<unit>[KMGT]?i?B)"
    r"\s+0x(?P<offset>[0-9a-f]+)\s+0x(?P<used>[0-9a-f]+)\s+0x(?P<total>[0-9a-f]+)"
    r"(?:\s+0x(?P<hva>[0-9a-f]+)\s+(?P<access>ro|rw))?\s*"
)


class MonitorBlock(msgspec.Struct, frozen=True, kw_only=True):
    """One line of ``info ramblock``. ``hva`` is None before QEMU 8.0, which does not print it.

    ``ram_addr``: the block's place in QEMU's own RAM address space, not guest-physical.
    """

    name: str
    page_size_bytes: int
    ram_addr: int
    used_length_bytes: int
    max_length_bytes: int
    hva: int | None


def parse_info_ramblock(text: str) -> list[MonitorBlock]:
    """Return all blocks in the monitor's order, also unnamed ones; other lines are skipped."""
    blocks: list[MonitorBlock] = []
    for line in text.splitlines():
        match = _LINE.fullmatch(line)
        if match is None:
            continue
        try:
            page_size = float(match["number"]) * _UNIT_BYTES[match["unit"]]
        except (ValueError, KeyError):
            continue
        blocks.append(
            MonitorBlock(
                name=match["name"],
                page_size_bytes=int(page_size),
                ram_addr=int(match["offset"], 16),
                used_length_bytes=int(match["used"], 16),
                max_length_bytes=int(match["total"], 16),
                hva=int(match["hva"], 16) if match["hva"] else None,
            )
        )
    return blocks
