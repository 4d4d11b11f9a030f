"""The pieces that a block's RAM is protected and copied in: its pages, unless there is a reason."""

from __future__ import annotations

from collections.abc import Sequence

import msgspec

from stillframe.capture.signal_protection import chunks_of
from stillframe.capture.write_protection import WriteProtection
from stillframe.errors import RefusedError
from stillframe.model import TARGET_PAGE_BYTES, RamBlock

MOST_PAGE_BYTES = 64 << 20
"""Larger huge pages would stall the guest for too long at each fault."""


def in_pieces(
    blocks: Sequence[RamBlock], protection: WriteProtection | None
) -> tuple[RamBlock, ...]:
    """The blocks with the size of a piece for that of a page.

    Raises:
        RefusedError: huge pages so large that each fault would stall the guest for long.
    """
    if protection is None:
        # A guest that stands still is copied in target pages, however large its huge pages are.
        sizes = [TARGET_PAGE_BYTES] * len(blocks)
    elif protection.kind == "mprotect":
        sizes = chunks_of(blocks)
    else:
        sizes = [block.page_size_bytes for block in blocks]
    for block, size in zip(blocks, sizes, strict=True):
        if size > MOST_PAGE_BYTES:
            raise RefusedError(
                f"{block.idstr} has huge pages of {size >> 20} MiB",
                why="each page is copied in one piece before the guest may write to it",
                remedy="use --mode stop, or smaller huge pages",
            )
    return tuple(
        msgspec.structs.replace(block, page_size_bytes=size)
        for block, size in zip(blocks, sizes, strict=True)
    )


def in_target_pages(block: RamBlock, first: int, pages: int) -> tuple[int, int]:
    """A run of a block's pieces in target pages, as far as it is in the block."""
    scale = block.page_size_bytes // TARGET_PAGE_BYTES
    whole = -(-block.used_length_bytes // TARGET_PAGE_BYTES)
    return first * scale, min(pages * scale, whole - first * scale)
