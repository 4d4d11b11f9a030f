"""How pages came into a snapshot: which were never populated, and which a fault saved.

One byte for each page of all blocks, in their order; in the manifest as a zstd frame in base64.
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
"""Never populated at the instant, or given back by then: it holds zeroes."""
FAULT: Final = 2
"""Saved, with its neighbours, since the guest was about to write to it before it had its turn."""
_LEVEL: Final = 3
_MOST_BYTES: Final = 4 << 20
_MOST_PAGES: Final = 1 << 26
"""256 GiB of RAM; of more nothing is recorded, since a byte for each page is held until the end."""


class PageOrigins:
    """Collects them while a snapshot is taken. Of one page several threads tell nothing."""

    def __init__(self, page_counts: Sequence[int]) -> None:
        self._first = [sum(page_counts[:number]) for number in range(len(page_counts))]
        total = sum(page_counts)
        self._pages = bytearray(total if total <= _MOST_PAGES else 0)

    def add(self, packed: BytesLike) -> None:
        """Runs in packed form (``index_builder.PACKED_RUN``), their kind ``NEVER`` or ``FAULT``."""
        if not self._pages:
            return
        for block, pages, first_page, kind, _ in PACKED_RUN.iter_unpack(packed):
            start = self._first[block] + first_page
            self._pages[start : start + pages] = bytes((kind,)) * pages

    def encode(self) -> str:
        """For the manifest; empty if there are none, or if they would take too much room there."""
        if self._pages.count(0) == len(self._pages):
            return ""
        packed = compress_table(self._pages, _LEVEL)
        return base64.b64encode(packed).decode() if len(packed) <= _MOST_BYTES else ""


def decode_origins(text: str, blocks: Sequence[BlockRecord], page_bytes: int) -> list[bytes]:
    """For each block a byte for each page; zeroes where nothing was recorded.

    Raises:
        DataError: it does not fit the blocks.
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
