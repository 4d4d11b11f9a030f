"""Verification of a snapshot file: digests, checksums, stream, and index against stream."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import msgspec

from stillframe.errors import DataError
from stillframe.still.frame_reader import FrameReader
from stillframe.still.index import Index, PageRun
from stillframe.still.records import (
    PREFIX_BYTES,
    Record,
    check_run,
    check_section_end,
    read_record,
    read_section_id,
)
from stillframe.still.skeleton import Pieces
from stillframe.vmstate.reader import StreamReader
from stillframe.vmstate.records import Description, Device, Pages, RamBlocks, ZeroRun

Progress = Callable[[int, int], None]
"""Called with (bytes of the stream done, bytes of the stream in total)."""


class VerifyReport(msgspec.Struct, frozen=True, kw_only=True):
    """Result of a verification; a damaged file raises instead.

    ``deep``: whether frames were decompressed and the stream was parsed. ``data_pages``,
    ``zero_pages``, ``missing_pages``: target pages of all blocks; missing pages are in no frame (an
    imported stream may lack pages, our own snapshots never do). ``superseded_pages``: records that
    a later one overwrites. ``devices``: names of device sections, empty if not deep.
    ``for_analysis``: it is sound, but cannot be restored.
    """

    id: str
    deep: bool
    frames: int
    stored_bytes: int
    stream_bytes: int
    data_pages: int
    zero_pages: int
    missing_pages: int
    superseded_pages: int = 0
    devices: tuple[str, ...] = ()
    has_description: bool | None = None
    for_analysis: bool = False


def verify_container(
    container: FrameReader, *, deep: bool, progress: Progress | None
) -> VerifyReport:
    """Check every digest; if ``deep``, also decompress everything and parse the stream to its end.

    Raises:
        DataError: anything is wrong; it names the frame and the offset.
    """
    index = container.index
    container.check_rest()
    data_pages = zero_pages = all_pages = 0
    for number, entry in enumerate(index.blocks):
        data, zero = index.page_counts(number)
        data_pages += data
        zero_pages += zero
        all_pages += -(-entry.used_length_bytes // index.target_page_bytes)
    report = VerifyReport(
        id=container.id,
        deep=deep,
        frames=index.frame_count,
        stored_bytes=index.stored_bytes,
        stream_bytes=index.stream_bytes,
        data_pages=data_pages,
        zero_pages=zero_pages,
        missing_pages=all_pages - data_pages - zero_pages,
        for_analysis=container.manifest.for_analysis,
    )
    if report.missing_pages and not container.may_lack_pages:
        raise DataError(f"{report.missing_pages} pages are missing")
    if not deep:
        for number in range(index.frame_count):
            container.read_stored(number)
            _tell(progress, index, number)
        return report
    walk = _Walk(container, progress)
    walk.run()
    return msgspec.structs.replace(
        report,
        superseded_pages=walk.superseded_pages,
        devices=tuple(walk.devices),
        has_description=walk.has_description,
    )


def _tell(progress: Progress | None, index: Index, number: int) -> None:
    if progress is not None:
        entry = index.frame(number)
        progress(entry.stream_offset_bytes + entry.raw_bytes, index.stream_bytes)


class _Walk:
    """A walk that reads every frame once. Frames with pages are compared with the index; the rest
    of the stream, which only lacks whole RAM sections, goes through the stream parser."""

    def __init__(self, container: FrameReader, progress: Progress | None) -> None:
        self._container = container
        self._index = container.index
        self._progress = progress
        self._numbers = {b.idstr: n for n, b in enumerate(self._index.blocks)}
        self.superseded_pages = 0
        self.devices: list[str] = []
        self.has_description = False

    def run(self) -> None:
        """Walk over the whole file.

        Raises:
            DataError: anything is wrong.
        """
        reader = StreamReader(Pieces(self._stream_without_pages()))
        for event in reader.events():
            match event:
                case RamBlocks():
                    self._check_blocks(event, reader.page_bytes)
                case Pages() | ZeroRun():
                    idstr = self._index.blocks[event.block_index].idstr
                    raise DataError(f"the stream has pages of block {idstr!r} outside its frames")
                case Device():
                    self.devices.append(event.section.idstr)
                case Description():
                    self.has_description = True
                case _:
                    pass

    def _stream_without_pages(self) -> Iterator[bytes]:
        index = self._index
        for number, raw in self._container.iter_frames(range(index.frame_count)):
            # The parser still sees a section, without its page records.
            pages_end = self._pages_end(number, raw)
            yield raw if pages_end is None else raw[:PREFIX_BYTES] + raw[pages_end:]
            _tell(self._progress, index, number)

    def _pages_end(self, number: int, raw: bytes) -> int | None:
        """Check the frame's page records and return where they end; None if it is not a RAM
        section."""
        runs = self._index.runs_of_frame(number)
        superseded_before = self.superseded_pages
        try:
            return self._check_pages(number, raw, runs)
        except DataError as error:
            if runs:
                raise self._container.at_frame(number, error) from error
            # Without runs, it may be a section whose pages are all superseded, or no section at
            # all.
            self.superseded_pages = superseded_before
            return None

    def _check_blocks(self, event: RamBlocks, page_bytes: int) -> None:
        index = self._index
        if page_bytes != index.target_page_bytes:
            raise DataError(
                f"the stream's pages have {page_bytes} bytes, the index says "
                f"{index.target_page_bytes}"
            )
        listed = [(b.idstr, b.used_length_bytes) for b in event.blocks]
        if listed != [(b.idstr, b.used_length_bytes) for b in index.blocks]:
            raise DataError("the stream's RAM blocks are not those of the index")

    def _check_pages(self, number: int, raw: bytes, runs: list[PageRun]) -> int:
        """Check that the frame is one RAM section whose records are all in the index or superseded;
        return where the records end."""
        section_id = read_section_id(raw)
        page_bytes = self._index.target_page_bytes
        position, block = PREFIX_BYTES, -1
        upcoming = iter([*runs, None])
        run = next(upcoming)
        while True:
            if run is not None and run.raw_offset == position:
                first = read_record(raw, position, page_bytes)
                if first is not None and first.idstr is None and run.block != block:
                    raise DataError("a page record does not name its block")
                block = run.block
                position = check_run(raw, run, self._index.blocks[block].idstr, page_bytes)
                run = next(upcoming)
                continue
            record = read_record(raw, position, page_bytes)
            if record is None:
                break
            block = self._check_superseded(number, position, record, block)
            position = record.end
        if run is not None:
            raise DataError("the index names pages where the frame has none")
        check_section_end(raw, position, section_id)
        return position

    def _check_superseded(self, number: int, position: int, record: Record, block: int) -> int:
        if record.idstr is not None:
            block = self._numbers.get(record.idstr, -1)
        if block < 0:
            raise DataError("a page record does not name a known block")
        page = record.offset_bytes // self._index.target_page_bytes
        found = self._index.lookup(block, page)
        if found is None or (found.frame, found.run.raw_offset) <= (number, position):
            idstr = self._index.blocks[block].idstr
            raise DataError(f"page {page} of block {idstr!r} is in the stream, not in the index")
        self.superseded_pages += 1
        return block
