"""The building of a RAM part, a frame's content, from runs of page records of other frames."""

from __future__ import annotations

from stillframe.still.index import KIND_DATA, KIND_ZERO, PageRun
from stillframe.still.records import PREFIX_BYTES, record_bytes
from stillframe.vmstate.page_records import page_records, zero_records
from stillframe.vmstate.writer import ram_part_prefix, ram_part_suffix


class RamSection:
    """A RAM part being built. ``runs``: its runs so far."""

    def __init__(self, section_id: int, *, footer: bool, page_bytes: int) -> None:
        self._parts: list[bytes | memoryview] = [ram_part_prefix(section_id)]
        self._end = ram_part_suffix(section_id, footer=footer)
        self._page_bytes = page_bytes
        self._length = PREFIX_BYTES
        self._block = -1
        self.runs: list[PageRun] = []

    def add(
        self, block: int, idstr: str, first_page: int, pages: int, content: memoryview | None
    ) -> None:
        """Add a run.

        Args:
            content: None for zero pages; else the first page's content, followed by the other
                pages' records (``records.record_bytes``), which name no block.
        """
        name = None if block == self._block else idstr
        page_bytes, offset = self._page_bytes, first_page * self._page_bytes
        kind = KIND_ZERO if content is None else KIND_DATA
        self.runs.append(PageRun(block, first_page, pages, kind, self._length))
        if content is None:
            parts: list[bytes | memoryview] = [
                zero_records(offset, pages, block=name, page_bytes=page_bytes)
            ]
        else:
            first = content[:page_bytes]
            rest = (pages - 1) * record_bytes(KIND_DATA, page_bytes)
            parts = [
                page_records(offset, first, block=name, page_bytes=page_bytes),
                content[page_bytes : page_bytes + rest],
            ]
        self._length += sum(map(len, parts))
        self._parts += parts
        self._block = block

    def finish(self) -> bytes:
        """Return the whole section."""
        return b"".join((*self._parts, self._end))
