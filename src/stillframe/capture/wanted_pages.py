"""The choice of pages to copy: those that were ever populated and may have changed."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence

from stillframe.capture._capture import Capture
from stillframe.capture.block_files import BlockFiles
from stillframe.capture.population import mark_populated
from stillframe.model import TARGET_PAGE_BYTES, RamBlock

ChangedOf = Callable[[RamBlock], Iterable[tuple[int, int]] | None]


class WantedPages:
    """The pages to copy: all, until :meth:`learn`.

    Args:
        blocks: as the machine lists them. pieces: the same blocks, as they are captured.

    Attributes:
        changed_of: returns what may have changed of a block; see ``RamCapture.copy_only``.
        copied_whole: names of the blocks that are copied whole.
        populated, wanted, all: numbers of target pages.
    """

    def __init__(self, blocks: Sequence[RamBlock], pieces: Sequence[RamBlock]) -> None:
        self._blocks = tuple(blocks)
        self._pieces = tuple(pieces)
        self.changed_of: ChangedOf | None = None
        self.copied_whole = tuple(block.idstr for block in blocks)
        self.populated = 0
        self.all = self.wanted = sum(
            block.pages * (block.page_size_bytes // TARGET_PAGE_BYTES) for block in pieces
        )

    def learn(self, core: Capture, files: BlockFiles, pid: int) -> None:
        """Tell the core which pages to copy; the blocks must be protected, or the guest stopped."""
        for index, block in enumerate(self._pieces):
            reader, held = files.readers[index], files.held.get(index)
            mark_populated(core, index, block, pid, reader, held)
        self.populated = core.populated_pages()
        if self.changed_of is None:
            return
        whole = []
        for index, (piece, block) in enumerate(zip(self._pieces, self._blocks, strict=True)):
            runs = self.changed_of(block)
            if runs is None:
                whole.append(block.idstr)
                continue
            core.track_changes(index)
            scale = piece.page_size_bytes // TARGET_PAGE_BYTES
            for first, pages in runs:
                page = first // scale
                core.mark_changed(index, page, -(-(first + pages) // scale) - page)
        self.copied_whole = tuple(whole)
        self.wanted = core.wanted_pages()
