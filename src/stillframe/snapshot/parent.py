"""The parent of an increment, and what may have changed since."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Protocol

from stillframe.model import ParentRecord, RamBlock
from stillframe.still.snapshot import Snapshot
from stillframe.store.locations import absolute

PageRuns = Iterable[tuple[int, int]]
"""(first page, pages), in target pages of a block."""


class ChangedPages(Protocol):
    """A source that knows which pages may have changed since the parent's instant."""

    def changed_pages(self, block: RamBlock) -> PageRuns | None:
        """Return all pages of a block that may differ from the parent's; None if unknown.

        Called after the block was protected and before the instant (with ``mode`` stop: while the
        guest stands still). The protection sees later writes and adds them, so the answer must
        contain every write from before the call.
        """


class Parent:
    """The parent of an increment, as a take uses it.

    Args:
        snapshot: open; the caller still has to close it.
        changes: the source of changed pages; without it all of RAM is compared with the parent's.
    """

    def __init__(self, snapshot: Snapshot, changes: ChangedPages | None = None) -> None:
        self.snapshot = snapshot
        self._changes = changes
        self._sizes = {block.idstr: block.used_length_bytes for block in snapshot.blocks}

    @property
    def record(self) -> ParentRecord:
        """The parent's record in the manifest."""
        return ParentRecord(id=self.snapshot.id, path=absolute(self.snapshot.description))

    def changed_pages(self, block: RamBlock) -> PageRuns | None:
        """As :meth:`ChangedPages.changed_pages`; always None for a block that is new or was
        resized, because pages that the parent does not have must be saved."""
        if self._changes is None or self._sizes.get(block.idstr) != block.used_length_bytes:
            return None
        return self._changes.changed_pages(block)
