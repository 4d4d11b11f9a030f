"""RAM sections: a list of records, each starting with an offset and flags in one word.

Source: QEMU ``migration/ram.c``, ``ram_save_page_legacy`` and ``ram_load_precopy``.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from struct import Struct
from typing import TypeAlias

from stillframe.errors import DataError
from stillframe.vmstate.block_list import BlockListReader
from stillframe.vmstate.mapped_ram import read_mapped_pages
from stillframe.vmstate.page_codecs import apply_xbzrle, inflate_page, packed_limit_bytes
from stillframe.vmstate.records import Pages, RamBlocks, StreamBlock, ZeroRun
from stillframe.vmstate.source import StreamSource
from stillframe.vmstate.wire import XBZRLE_ENCODING, RamFlag

PageLookup: TypeAlias = Callable[[int, int], bytes]
"""Returns a page's current content by (block index, byte offset)."""

RUN_LIMIT_BYTES = 1 << 20
"""The reader yields adjacent pages in runs of up to this many bytes."""
ZERO_RUN_LIMIT_PAGES = 1 << 18

_WORD = Struct(">Q")
_WORD_BYTES = 8
_KIND_FLAGS = (
    RamFlag.ZERO | RamFlag.MEM_SIZE | RamFlag.PAGE | RamFlag.EOS | RamFlag.XBZRLE
) | RamFlag.COMPRESS_PAGE
_PAGE_NEXT = int(RamFlag.PAGE | RamFlag.CONTINUE)
_ZERO_NEXT = int(RamFlag.ZERO | RamFlag.CONTINUE)
_PAGE_KINDS = frozenset({RamFlag.ZERO, RamFlag.PAGE, RamFlag.XBZRLE, RamFlag.COMPRESS_PAGE})

_MULTIFD = "this is a multifd stream"
_REMEDY = "save the VM with default capabilities"
_REFUSED = {
    RamFlag.HOOK: (
        "this is an RDMA stream",
        "its pages were written into the other host's memory and are not in the stream",
    ),
    RamFlag.MULTIFD_FLUSH: (
        _MULTIFD,
        "its pages went through other channels and are not in this one",
    ),
    RamFlag.FULL: ("the stream has a RAM record of before 2009", "flag FULL is obsolete"),
}

_Run: TypeAlias = Pages | ZeroRun
RamEvent: TypeAlias = RamBlocks | Pages | ZeroRun


class RamReader:
    """A parser of the RAM section; its state persists across the section's parts."""

    def __init__(
        self, source: StreamSource, *, page_bytes: int, page_lookup: PageLookup | None
    ) -> None:
        self._source = source
        self._page_bytes = page_bytes
        self._page_lookup = page_lookup
        self._flag_mask = page_bytes - 1
        self._block_index: int | None = None
        self._indexes: dict[str, int] = {}
        self.blocks: tuple[StreamBlock, ...] | None = None
        self._data_came = False
        self._zero_pages: list[int] = []

    def read_block_list(
        self, *, addresses: bool, page_sizes: bool, mapped: bool
    ) -> Iterator[RamEvent]:
        """Read the first record of the START section, which lists the blocks.

        Raises:
            DataError: another record is there, or the list is damaged.
        """
        source = self._source
        start = source.offset
        word = source.u64("the list of RAM blocks")
        flags = word & self._flag_mask
        if flags != RamFlag.MEM_SIZE:
            raise DataError(
                "the RAM section does not start with the list of blocks",
                why=f"found flags 0x{flags:x}",
                offset_bytes=start,
            )
        reader = BlockListReader(
            source,
            page_bytes=self._page_bytes,
            addresses=addresses,
            page_sizes=page_sizes,
            mapped=mapped,
        )
        reader.read(word - flags)
        self.blocks = tuple(reader.blocks)
        self._indexes = {block.idstr: index for index, block in enumerate(self.blocks)}
        self._zero_pages = [0] * len(self.blocks)
        yield RamBlocks(blocks=self.blocks)
        if mapped:
            resume = source.file_position()
            resume_offset = source.offset
            for index, mapped_block in enumerate(reader.mapped_blocks):
                if mapped_block.pages_offset:
                    yield from read_mapped_pages(source, index, mapped_block, self._page_bytes)
            source.seek(resume, stream_offset=resume_offset)

    def read_records(self) -> Iterator[_Run]:
        """Read records up to and including EOS, in runs of adjacent pages.

        Raises:
            DataError: truncated, malformed, or of an unsupported kind.
        """
        for run in self._read_runs():
            if isinstance(run, ZeroRun):
                self._zero_pages[run.block_index] += run.pages
            else:
                self._data_came = True
            yield run

    def check_complete(self) -> None:
        """Refuse a stream whose data pages went through other channels.

        QEMU up to 8.0 does not mark multifd streams, but sends only the zero pages in the main one.
        In no other stream is a block partly sent without a byte of data.

        Raises:
            DataError: the stream is a multifd one.
        """
        if self._data_came or self.blocks is None:
            return
        for block, zero_pages in zip(self.blocks, self._zero_pages, strict=True):
            if 0 < zero_pages < block.used_length_bytes // self._page_bytes:
                raise DataError(
                    _MULTIFD,
                    why=f"of RAM block '{block.idstr}' only zero pages are in it",
                    remedy=_REMEDY,
                    offset_bytes=self._source.offset,
                )

    def _read_runs(self) -> Iterator[_Run]:
        page_bytes = self._page_bytes
        while True:
            yield from self._read_page_runs()
            # The rare cases: another block, another record kind, the end.
            source = self._source
            start = source.offset
            word = source.u64("a RAM record")
            flags = word & self._flag_mask
            offset_bytes = word - flags
            if flags == RamFlag.EOS and offset_bytes == 0:
                return
            kind = self._page_kind(flags, start)
            self._choose_block(flags, start)
            index, length = self._current(start)
            if offset_bytes + page_bytes > length:
                raise self._beyond(offset_bytes, start)
            yield self._read_page(kind, index, offset_bytes)

    def _read_page_runs(self) -> Iterator[_Run]:
        """Yield whole and zero pages of the same block as the last record; this loop must be
        fast."""
        if self._block_index is None or self.blocks is None:
            return
        source = self._source
        index = self._block_index
        page_bytes = self._page_bytes
        mask = self._flag_mask
        last_offset = self.blocks[index].used_length_bytes - page_bytes
        unpack = _WORD.unpack_from
        page_record = _WORD_BYTES + page_bytes
        zero_record = _WORD_BYTES + 1
        while source.prefetch_if_stored(page_record) or source.prefetch(_WORD_BYTES):
            (word,) = unpack(source.buffer, source.position)
            kind = word & mask
            record_bytes = page_record if kind == _PAGE_NEXT else zero_record
            if kind not in (_PAGE_NEXT, _ZERO_NEXT) or not source.prefetch(record_bytes):
                return
            buffer = source.buffer
            position = source.position
            offset = first = word - kind
            if kind == _PAGE_NEXT:
                stop = min(len(buffer), position + page_record * (RUN_LIMIT_BYTES // page_bytes))
                parts = []
                while (
                    word == offset | _PAGE_NEXT
                    and offset <= last_offset
                    and position + page_record <= stop
                ):
                    parts.append(buffer[position + _WORD_BYTES : position + page_record])
                    position += page_record
                    offset += page_bytes
                    if position + _WORD_BYTES > stop:
                        break
                    (word,) = unpack(buffer, position)
                if not parts:
                    return
                source.position = position
                yield Pages(index, first, b"".join(parts))
            else:
                stop = len(buffer)
                limit = min(last_offset, first + ZERO_RUN_LIMIT_PAGES * page_bytes)
                while (
                    word == offset | _ZERO_NEXT
                    and offset <= limit
                    and position + zero_record <= stop
                    and buffer[position + _WORD_BYTES] == 0
                ):
                    position += zero_record
                    offset += page_bytes
                    if position + _WORD_BYTES > stop:
                        break
                    (word,) = unpack(buffer, position)
                if offset == first:
                    return
                source.position = position
                yield ZeroRun(index, first, (offset - first) // page_bytes)

    def _page_kind(self, flags: int, start: int) -> RamFlag:
        for flag, (what, why) in _REFUSED.items():
            if flags & flag:
                raise DataError(
                    what,
                    why=why,
                    remedy=_REMEDY,
                    offset_bytes=start,
                )
        kind = RamFlag(flags & _KIND_FLAGS)
        if kind not in _PAGE_KINDS or flags & ~(kind | RamFlag.CONTINUE):
            raise DataError(
                "a RAM record is malformed", why=f"its flags are 0x{flags:x}", offset_bytes=start
            )
        return kind

    def _choose_block(self, flags: int, start: int) -> None:
        if flags & RamFlag.CONTINUE:
            return
        name = self._source.name("a RAM block's name")
        index = self._indexes.get(name)
        if index is None:
            raise DataError(f"a page is of an unknown RAM block '{name}'", offset_bytes=start)
        self._block_index = index

    def _current(self, start: int) -> tuple[int, int]:
        if self._block_index is None or self.blocks is None:
            raise DataError("the first page does not name its RAM block", offset_bytes=start)
        return self._block_index, self.blocks[self._block_index].used_length_bytes

    def _beyond(self, offset_bytes: int, start: int) -> DataError:
        index, length = self._current(start)
        name = self.blocks[index].idstr if self.blocks else "?"
        return DataError(
            f"a page is beyond the end of RAM block '{name}'",
            why=f"offset {offset_bytes} of {length} bytes",
            offset_bytes=start,
        )

    def _read_page(self, kind: RamFlag, index: int, offset_bytes: int) -> _Run:
        source = self._source
        start = source.offset
        if kind == RamFlag.PAGE:
            return Pages(index, offset_bytes, source.take(self._page_bytes, "a page"))
        if kind == RamFlag.ZERO:
            fill = source.u8("a zero page")
            if fill != 0:
                raise DataError(f"a zero page is filled with {fill}", offset_bytes=start)
            return ZeroRun(index, offset_bytes, 1)
        if kind == RamFlag.COMPRESS_PAGE:
            size = source.u32("a compressed page")
            if not 0 < size <= packed_limit_bytes(self._page_bytes):
                raise DataError(f"a compressed page has {size} bytes", offset_bytes=start)
            packed = source.take(size, "a compressed page")
            return Pages(
                index, offset_bytes, inflate_page(packed, self._page_bytes, offset_bytes=start)
            )
        return self._read_xbzrle(index, offset_bytes)

    def _read_xbzrle(self, index: int, offset_bytes: int) -> Pages:
        source = self._source
        start = source.offset
        encoding = source.u8("an XBZRLE page")
        size = source.u16("an XBZRLE page")
        if encoding != XBZRLE_ENCODING or size > self._page_bytes:
            raise DataError(
                "an XBZRLE page is malformed",
                why=f"encoding {encoding}, {size} bytes",
                offset_bytes=start,
            )
        if self._page_lookup is None:
            raise DataError(
                "the stream has XBZRLE pages, which change an earlier page",
                why="the pages so far are not kept here",
                remedy="save the VM without capability xbzrle",
                offset_bytes=start,
            )
        delta = source.take(size, "an XBZRLE page")
        before = self._page_lookup(index, offset_bytes)
        if len(before) != self._page_bytes:
            raise DataError(
                "an XBZRLE page changes a page that did not come before", offset_bytes=start
            )
        return Pages(index, offset_bytes, apply_xbzrle(delta, before, offset_bytes=start))
