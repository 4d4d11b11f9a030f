"""The list of RAM blocks: the MEM_SIZE record (QEMU ``migration/ram.c``, ``ram_save_setup``)."""

from __future__ import annotations

from stillframe.errors import DataError
from stillframe.vmstate.mapped_ram import MappedBlock, read_mapped_header
from stillframe.vmstate.records import StreamBlock
from stillframe.vmstate.source import StreamSource
from stillframe.vmstate.wire import RamFlag

BLOCK_COUNT_LIMIT = 4096
RAM_LIMIT_BYTES = 1 << 46
"""64 TiB; no VM has more."""
_PAGE_SIZE_RANGE_BYTES = range(1 << 10, (1 << 40) + 1)


class BlockListReader:
    """A reader of the block list, whose form depends on the stream's capabilities.

    Args:
        page_bytes: the target's page size.
        addresses: capability x-ignore-shared is on.
        page_sizes: postcopy was advised, so a block's page size may follow its length.
        mapped: capability mapped-ram is on.
    """

    def __init__(
        self,
        source: StreamSource,
        *,
        page_bytes: int,
        addresses: bool,
        page_sizes: bool,
        mapped: bool,
    ) -> None:
        self._source = source
        self._page_bytes = page_bytes
        self._addresses = addresses
        self._page_sizes = page_sizes
        self._mapped = mapped
        self.blocks: list[StreamBlock] = []
        self.mapped_blocks: list[MappedBlock] = []

    def read(self, total_bytes: int) -> None:
        """Fill ``blocks`` (and ``mapped_blocks``) up to ``total_bytes`` of RAM.

        Raises:
            DataError: the list is truncated, has a name or size that no VM has, or misses that sum.
        """
        source = self._source
        if not 0 < total_bytes <= RAM_LIMIT_BYTES:
            raise DataError(
                f"the stream claims {total_bytes} bytes of RAM", offset_bytes=source.offset - 8
            )
        names: set[str] = set()
        left_bytes = total_bytes
        while left_bytes:
            start = source.offset
            if len(self.blocks) == BLOCK_COUNT_LIMIT:
                raise DataError(
                    f"the stream claims more than {BLOCK_COUNT_LIMIT} RAM blocks",
                    offset_bytes=start,
                )
            idstr = source.name("a RAM block's name")
            used_length_bytes = source.u64("a RAM block's length")
            if idstr in names:
                raise DataError(f"RAM block '{idstr}' is there twice", offset_bytes=start)
            names.add(idstr)
            if (
                used_length_bytes == 0
                or used_length_bytes % self._page_bytes
                or used_length_bytes > left_bytes
            ):
                raise DataError(
                    f"RAM block '{idstr}' has an impossible length of {used_length_bytes} bytes",
                    why=f"{left_bytes} of {total_bytes} bytes of RAM are left for it, in pages "
                    f"of {self._page_bytes}",
                    offset_bytes=start,
                )
            left_bytes -= used_length_bytes
            page_size_bytes = self._page_size() if self._page_sizes else None
            address = source.u64("a RAM block's address") if self._addresses else None
            self.blocks.append(
                StreamBlock(
                    idstr=idstr,
                    used_length_bytes=used_length_bytes,
                    page_size_bytes=page_size_bytes,
                    address=address,
                )
            )
            if self._mapped:
                self.mapped_blocks.append(
                    read_mapped_header(source, used_length_bytes, self._page_bytes)
                )

    def _page_size(self) -> int | None:
        """Return a block's page size, which QEMU sends only if it differs from the host's.

        Otherwise the next block's name follows, whose length is not 0, or the EOS record, whose
        value is no page size.
        """
        source = self._source
        if source.peek() != 0:
            return None
        source.need(8, "a RAM block's page size")
        value = int.from_bytes(source.buffer[source.position : source.position + 8], "big")
        if value == RamFlag.EOS:
            return None
        if value & (value - 1) or value not in _PAGE_SIZE_RANGE_BYTES:
            raise DataError(
                f"a RAM block has an impossible page size of {value} bytes",
                offset_bytes=source.offset,
            )
        return source.u64("a RAM block's page size")
