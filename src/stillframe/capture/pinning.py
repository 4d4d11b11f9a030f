"""The test whether RAM may be pinned while it is saved (``_pins.pxd``)."""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path

from stillframe.model import TARGET_PAGE_BYTES, RamBlock

_HUGE_PAGES = Path("/sys/kernel/mm/transparent_hugepage")
_CHOSEN = re.compile(r"\[(\w+)\]")
_NEVER = frozenset({"never", "deny"})


def may_be_pinned(block: RamBlock) -> bool:
    """Return whether a pinned page keeps its content when it is punched out of the block's file.

    A part of a large folio does not: the kernel cannot split a folio that is pinned, and zeroes the
    part instead (Linux ``mm/truncate.c``: truncate_inode_partial_folio). So only small pages of
    memfds qualify, and only if the kernel makes no large folios of them.
    """
    small = block.page_size_bytes == TARGET_PAGE_BYTES and block.backing == "memfd"
    return small and not any(mode not in _NEVER for mode in _modes())


def _modes() -> Iterator[str]:
    """Yield the huge page mode of shared memory (``always``, ``never``, ...), overall and for each
    size; ``inherit`` resolves to the overall mode."""
    overall = _chosen(_HUGE_PAGES / "shmem_enabled")
    yield overall
    for size in _HUGE_PAGES.glob("hugepages-*/shmem_enabled"):
        mode = _chosen(size)
        yield overall if mode == "inherit" else mode


def _chosen(file: Path) -> str:
    try:
        found = _CHOSEN.search(file.read_text())
    except FileNotFoundError:
        return "never"  # a kernel without huge pages
    return found[1] if found else "unknown"
