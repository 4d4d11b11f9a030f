"""The frames of an import: whole RAM parts for pages, raw pieces for the rest."""

from __future__ import annotations

import struct
from collections import deque
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Final, Self

from stillframe.errors import InternalError
from stillframe.still.frames import FRAME_RAW_TARGET_BYTES, EncodedFrame
from stillframe.still.index import KIND_DATA, KIND_ZERO, WORD_BYTES, ZERO_RECORD_BYTES, PageRun
from stillframe.still.writer import SnapshotWriter
from stillframe.vmstate import writer as stream_writer
from stillframe.vmstate.devices import encode_name
from stillframe.vmstate.wire import RamFlag

_WORKERS: Final = 2
_WORD = struct.Struct(">Q")
_FLAGS: Final = {KIND_DATA: RamFlag.PAGE.value, KIND_ZERO: RamFlag.ZERO.value}
_CONTINUE: Final = RamFlag.CONTINUE.value


class FrameBuilder:
    """Collector of stream pieces in order, which writes them as frames of about 1 MiB.

    Each run of pages starts with a record that names its block, as
    ``SnapshotWriter(later_pages_win=True)`` requires. A few frames at a time are compressed on
    other threads. Use it as a context manager.
    """

    def __init__(self, snapshot_writer: SnapshotWriter, ram_section_id: int) -> None:
        self._writer = snapshot_writer
        self._section_id = ram_section_id
        self._prefix = stream_writer.ram_part_prefix(ram_section_id)
        self._suffix = b""
        self._pool = ThreadPoolExecutor(_WORKERS, thread_name_prefix="still-import")
        self._pending: deque[tuple[Future[EncodedFrame], list[PageRun]]] = deque()
        self._plain = bytearray()
        self._ram = bytearray()
        self._runs: list[PageRun] = []
        self._names: list[bytes] = []
        self._next_name: bytes | None = None
        self._flag = 0
        self._page_bytes = 0

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_error: object) -> None:
        self._pool.shutdown(cancel_futures=True)

    def start_ram(self, blocks: list[tuple[str, int]], page_bytes: int, *, footers: bool) -> None:
        """Add the START section with the RAM blocks, before any page."""
        section_id = self._section_id
        self._suffix = stream_writer.ram_part_suffix(section_id, footer=footers)
        self._names = [bytes((len(name),)) + encode_name(name) for name, _ in blocks]
        self._page_bytes = page_bytes
        self.add_stream(
            stream_writer.ram_start_section(blocks, section_id=section_id, footer=footers)
        )

    def add_stream(self, piece: bytes) -> None:
        """Add a piece without pages.

        Raises:
            SinkError: the destination cannot take a frame.
        """
        self._end_ram()
        self._plain += piece
        if len(self._plain) >= FRAME_RAW_TARGET_BYTES:
            self._end_plain()

    def add_pages(self, block: int, offset_bytes: int, data: bytes) -> None:
        """Add consecutive pages.

        Raises:
            SinkError: the destination cannot take a frame.
        """
        page_bytes = self._page_bytes
        start = 0
        while start < len(data):
            pages = self._room(WORD_BYTES + page_bytes, (len(data) - start) // page_bytes)
            self._begin_run(block, offset_bytes + start, pages, KIND_DATA)
            pieces: list[bytes] = []
            for place in range(start, start + pages * page_bytes, page_bytes):
                pieces += (self._head(offset_bytes + place), data[place : place + page_bytes])
            self._ram += b"".join(pieces)
            start += pages * page_bytes

    def add_zeroes(self, block: int, offset_bytes: int, pages: int) -> None:
        """Add consecutive zero pages.

        Raises:
            SinkError: the destination cannot take a frame.
        """
        page_bytes = self._page_bytes
        while pages:
            count = self._room(ZERO_RECORD_BYTES, pages)
            self._begin_run(block, offset_bytes, count, KIND_ZERO)
            end = offset_bytes + count * page_bytes
            pieces: list[bytes] = []
            for place in range(offset_bytes, end, page_bytes):
                pieces += (self._head(place), b"\0")
            self._ram += b"".join(pieces)
            offset_bytes = end
            pages -= count

    def flush(self) -> None:
        """Write everything that was added.

        Raises:
            SinkError: the destination cannot take a frame.
        """
        self._end_ram()
        self._end_plain()
        while self._pending:
            self._append_next()

    def _room(self, record_bytes: int, wanted: int) -> int:
        """Return how many records fit in the current frame (at least one); start a new frame if it
        is full."""
        if len(self._ram) >= FRAME_RAW_TARGET_BYTES:
            self._end_ram()
        left = FRAME_RAW_TARGET_BYTES - len(self._ram)
        return min(wanted, -(-left // record_bytes))

    def _begin_run(self, block: int, offset_bytes: int, pages: int, kind: int) -> None:
        """Begin a run or extend the last one."""
        if not self._names:
            raise InternalError("pages came before the list of blocks")
        self._end_plain()
        if not self._ram:
            self._ram += self._prefix
        first_page = offset_bytes // self._page_bytes
        last = self._runs[-1] if self._runs else None
        self._flag = _FLAGS[kind]
        if last is not None and _continues(last, block, first_page, kind):
            self._runs[-1] = last._replace(pages=last.pages + pages)
            self._next_name = None
        else:
            self._runs.append(PageRun(block, first_page, pages, kind, len(self._ram)))
            self._next_name = self._names[block]

    def _head(self, offset_bytes: int) -> bytes:
        """Return a record's header; the first one of a run names the block."""
        name, self._next_name = self._next_name, None
        if name is None:
            return _WORD.pack(offset_bytes | self._flag | _CONTINUE)
        return _WORD.pack(offset_bytes | self._flag) + name

    def _end_ram(self) -> None:
        if self._ram:
            self._ram += self._suffix
            self._submit(self._ram, self._runs)
            self._ram, self._runs = bytearray(), []

    def _end_plain(self) -> None:
        view = memoryview(self._plain)
        for start in range(0, len(view), FRAME_RAW_TARGET_BYTES):
            self._submit(view[start : start + FRAME_RAW_TARGET_BYTES], [])
        self._plain = bytearray()

    def _submit(self, raw: bytearray | memoryview, runs: list[PageRun]) -> None:
        self._pending.append((self._pool.submit(self._writer.encode, raw), runs))
        if len(self._pending) > 2 * _WORKERS:
            self._append_next()

    def _append_next(self) -> None:
        future, runs = self._pending.popleft()
        self._writer.append(future.result(), runs)


def _continues(last: PageRun, block: int, first_page: int, kind: int) -> bool:
    return (last.block, last.kind, last.first_page + last.pages) == (block, kind, first_page)
