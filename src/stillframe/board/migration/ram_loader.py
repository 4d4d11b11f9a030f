"""The loader of guest RAM from the ``ram`` sections of an incoming stream.

Source: QEMU ``migration/ram.c``: ram_load_precopy, ram_load_postcopy.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

from stillframe.board.memory.guest_ram import GuestRam
from stillframe.board.memory.missing_pages import MissingPages
from stillframe.errors import DataError
from stillframe.model import TARGET_PAGE_BYTES
from stillframe.vmstate.ram_reader import RamReader
from stillframe.vmstate.records import Pages, RamBlocks, StreamBlock, ZeroRun
from stillframe.vmstate.source import StreamSource

_RECEIVED = b"\1"


class RamLoader:
    """The state of one load.

    Args:
        find: returns this machine's RAM block for a name and length, or None.
        names: returns the names of all its RAM blocks: the stream must hold each.
    """

    def __init__(
        self,
        find: Callable[[str, int], GuestRam | None],
        names: Callable[[], Sequence[str]],
    ) -> None:
        self._find = find
        self._names = names
        self._reader: RamReader | None = None
        self._source: StreamSource | None = None
        self._rams: list[GuestRam] = []
        self._received: list[bytearray] = []
        self.page_sizes = False
        """Whether the block list may hold page sizes, that is, postcopy was advised."""
        self.filler: MissingPages | None = None
        """Places pages from POSTCOPY_LISTEN on; None before."""

    @property
    def rams(self) -> tuple[GuestRam, ...]:
        """The stream's blocks, in its order."""
        return tuple(self._rams)

    def load(self, source: StreamSource) -> None:
        """Load one section's payload: the block list first, then pages.

        Raises:
            DataError: it is damaged, or its RAM blocks do not match this machine's.
        """
        reader = self._reader
        if reader is None:
            reader = RamReader(source, page_bytes=TARGET_PAGE_BYTES, page_lookup=None)
            for event in reader.read_block_list(
                addresses=False, page_sizes=self.page_sizes, mapped=False
            ):
                if isinstance(event, RamBlocks):
                    self._match(event.blocks)
            self._reader, self._source = reader, source
        if source is not self._source:
            raise DataError("pages come in a packaged stream")
        for run in reader.read_records():
            if isinstance(run, ZeroRun):
                self._zero(run)
            else:
                self._fill(run)

    def _match(self, blocks: Sequence[StreamBlock]) -> None:
        for block in blocks:
            ram = self._find(block.idstr, block.used_length_bytes)
            if ram is None:
                raise DataError(
                    f"Unknown ramblock '{block.idstr}', cannot accept migration",
                    why=f"this machine has {', '.join(self._names())}",
                )
            if ram.length_bytes != block.used_length_bytes:
                raise DataError(
                    f"Size mismatch: {block.idstr}: "
                    f"{block.used_length_bytes:#x} != {ram.length_bytes:#x}",
                    remedy="start the destination with as much RAM as the source has",
                )
            self._rams.append(ram)
            self._received.append(bytearray(ram.length_bytes // TARGET_PAGE_BYTES))
        missing = set(self._names()) - {block.idstr for block in blocks}
        if missing:
            raise DataError(f"the stream has no RAM block '{min(missing)}', which is here")

    def _fill(self, run: Pages) -> None:
        if self.filler is not None:
            self.filler.place(run.block_index, run.offset_bytes, run.data)
        else:
            self._rams[run.block_index].write(run.offset_bytes, run.data)
        self._mark(run.block_index, run.offset_bytes, len(run.data) // TARGET_PAGE_BYTES)

    def _zero(self, run: ZeroRun) -> None:
        length_bytes = run.pages * TARGET_PAGE_BYTES
        if self.filler is not None:
            self.filler.place_zeroes(run.block_index, run.offset_bytes, length_bytes)
        else:
            self._rams[run.block_index].clear(run.offset_bytes, length_bytes)
        self._mark(run.block_index, run.offset_bytes, run.pages)

    def _mark(self, block: int, offset_bytes: int, pages: int) -> None:
        first = offset_bytes // TARGET_PAGE_BYTES
        self._received[block][first : first + pages] = _RECEIVED * pages

    def index_of(self, idstr: str) -> int:
        """Return a block's number in the stream.

        Raises:
            DataError: the stream has no block of this name.
        """
        for index, ram in enumerate(self._rams):
            if ram.idstr == idstr:
                return index
        raise DataError(f"unknown RAM block '{idstr}'")

    def received(self, block: int, page: int) -> bool:
        """Return whether a page has arrived and was not discarded since."""
        return bool(self._received[block][page])

    def discard(self, block: int, first_page: int, pages: int) -> None:
        """Discard old pages: clear them, and note them as not received.

        Raises:
            DataError: they are not all within the block.
        """
        if first_page + pages > len(self._received[block]):
            raise DataError(f"discarded pages beyond RAM block '{self._rams[block].idstr}'")
        self._rams[block].clear(first_page * TARGET_PAGE_BYTES, pages * TARGET_PAGE_BYTES)
        self._received[block][first_page : first_page + pages] = bytes(pages)

    def check_complete(self) -> None:
        """Refuse to run a guest with missing pages.

        Raises:
            DataError: pages are missing; the message gives the first one's offset.
        """
        if self._reader is None:
            raise DataError("the stream has no RAM")
        for ram, received in zip(self._rams, self._received, strict=True):
            missing = received.count(0)
            if missing:
                raise DataError(
                    f"{missing} pages of RAM block '{ram.idstr}' are not in the stream",
                    why=f"the first is at offset {received.find(0) * TARGET_PAGE_BYTES:#x}",
                )
