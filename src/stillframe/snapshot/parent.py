"""The snapshot that an increment goes on from, and what may have changed since."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Protocol

from stillframe.model import ParentRecord, RamBlock
from stillframe.still.snapshot import Snapshot
from stillframe.store.locations import absolute

PageRuns = Iterable[tuple[int, int]]
"""(first page, pages), in target pages of a block."""


class ChangedPages(Protocol):
    """Somebody who knows which pages may have changed since the parent's instant."""

    def changed_pages(self, block: RamBlock) -> PageRuns | None:
        """All pages of a block that may differ from the parent's; None if that is not known.

        Asked after the block was protected, and before the instant (in the stop, where the guest
        stands still throughout). What is written from the question on is seen by the protection,
        and added. So a write is lost only if it came before the question and is not in the answer.
        """


class Parent:
    """What a take needs of its parent.

    Args:
        snapshot: open; stays the caller's.
        changes: who knows what may have changed; else all of RAM is compared with the parent's.
    """

    def __init__(self, snapshot: Snapshot, changes: ChangedPages | None = None) -> None:
        self.snapshot = snapshot
        self._changes = changes
        self._sizes = {block.idstr: block.used_length_bytes for block in snapshot.blocks}

    @property
    def record(self) -> ParentRecord:
        """As the manifest keeps it."""
        return ParentRecord(id=self.snapshot.id, path=absolute(self.snapshot.description))

    def changed_pages(self, block: RamBlock) -> PageRuns | None:
        """As :meth:`ChangedPages.changed_pages`; a block that is new or has another size is never
        known: what the parent does not have of it is saved in full."""
        if self._changes is None or self._sizes.get(block.idstr) != block.used_length_bytes:
            return None
        return self._changes.changed_pages(block)
