"""The origin of a snapshot's pages: which were never populated, and which a fault saved.

One byte per page of all blocks, in their order; in the manifest as a zstd frame in base64.
"""

from __future__ import annotations

import base64
import binascii
from collections.abc import Sequence
from typing import Final

from stillframe.errors import DataError
from stillframe.model import BlockRecord
from stillframe.still.frames import BytesLike, compress_table, decompress_table
from stillframe.still.index_builder import PACKED_RUN

NEVER: Final = 1
"""Not populated at the point in time (never, or discarded before): the page is zero."""
FAULT: Final = 2
"""Saved out of turn, with its neighbours, because the guest was about to write to it."""
_LEVEL: Final = 3
_MOST_BYTES: Final = 4 << 20
_MOST_PAGES: Final = 1 << 26
"""256 GiB of RAM; beyond that nothing is recorded, as a byte per page is held until the end."""


class PageOrigins:
    """Collector of origins while a snapshot is taken. No two threads report the same page."""

    def __init__(self, page_counts: Sequence[int]) -> None:
        self._first = [sum(page_counts[:number]) for number in range(len(page_counts))]
        total = sum(page_counts)
        self._pages = bytearray(total if total <= _MOST_PAGES else 0)

    def add(self, packed: BytesLike) -> None:
        """Add runs in packed form (``index_builder.PACKED_RUN``), of kind ``NEVER`` or
        ``FAULT``."""
        if not self._pages:
            return
        for block, pages, first_page, kind, _ in PACKED_RUN.iter_unpack(packed):
            start = self._first[block] + first_page
            self._pages[start : start + pages] = bytes((kind,)) * pages

    def encode(self) -> str:
        """Encode for the manifest; empty if there are none, or if they would take too much room."""
        if self._pages.count(0) == len(self._pages):
            return ""
        packed = compress_table(self._pages, _LEVEL)
        return base64.b64encode(packed).decode() if len(packed) <= _MOST_BYTES else ""


def decode_origins(text: str, blocks: Sequence[BlockRecord], page_bytes: int) -> list[bytes]:
    """Return one byte per page for each block; zeroes where nothing was recorded.

    Raises:
        DataError: the record does not fit the blocks.
    """
    counts = [-(-block.used_length_bytes // page_bytes) for block in blocks]
    if not text:
        return [bytes(count) for count in counts]
    try:
        packed = base64.b64decode(text, validate=True)
    except binascii.Error as error:
        raise DataError("the manifest's record of page origins is damaged") from error
    pages = decompress_table(packed, sum(counts))
    found, start = [], 0
    for count in counts:
        found.append(pages[start : start + count])
        start += count
    return found
