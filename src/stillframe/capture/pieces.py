"""The pieces in which a block's RAM is protected and copied: by default its pages."""

from __future__ import annotations

from collections.abc import Sequence

import msgspec

from stillframe.capture.signal_protection import chunks_of
from stillframe.capture.write_protection import WriteProtection
from stillframe.errors import RefusedError
from stillframe.model import TARGET_PAGE_BYTES, RamBlock

MOST_PAGE_BYTES = 64 << 20
"""Each fault on a larger page would stall the guest for too long."""


def in_pieces(
    blocks: Sequence[RamBlock], protection: WriteProtection | None
) -> tuple[RamBlock, ...]:
    """Return the blocks with ``page_size_bytes`` replaced by the size of a piece.

    Raises:
        RefusedError: a block's huge pages are so large that each fault would stall the guest.
    """
    if protection is None:
        # The guest stands still, so target pages will do, whatever the page size.
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
    """Convert a run of a block's pieces to target pages, clipped to the block."""
    scale = block.page_size_bytes // TARGET_PAGE_BYTES
    whole = -(-block.used_length_bytes // TARGET_PAGE_BYTES)
    return first * scale, min(pages * scale, whole - first * scale)
