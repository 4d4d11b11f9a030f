"""Frames for an import: whole RAM parts for pages, plain pieces for everything between."""

from __future__ import annotations

import struct
from collections import deque
from concurrent.futures import Future, ThreadPoolExecutor
from types import TracebackType
from typing import Final, Self

from stillframe.errors import InternalError
from stillframe.store.frames import FRAME_RAW_TARGET_BYTES, EncodedFrame
from stillframe.store.index import KIND_DATA, KIND_ZERO, ZERO_RECORD_BYTES, PageRun
from stillframe.store.writer import SnapshotWriter
from stillframe.vmstate import writer as stream_writer
from stillframe.vmstate.wire import RamFlag

_WORKERS: Final = 2
_WORD = struct.Struct(">Q")
_ZERO_RECORD = struct.Struct(">QB")
_NEXT_PAGE = int(RamFlag.PAGE | RamFlag.CONTINUE)
_NEXT_ZERO = int(RamFlag.ZERO | RamFlag.CONTINUE)


class FrameBuilder:
    """Collects the stream's pieces in order, and writes them as frames of about 1 MiB.

    Each run of pages starts with a record that names its block, as
    ``SnapshotWriter(later_pages_win=True)`` wants it. Compression runs on other threads, a
    few frames at a time. Use it as a context manager.
    """

    def __init__(self, snapshot_writer: SnapshotWriter, ram_section_id: int) -> None:
        self._writer = snapshot_writer
        self._prefix = stream_writer.ram_part_prefix(ram_section_id)
        self._suffix = stream_writer.ram_part_suffix(ram_section_id)
        self._pool = ThreadPoolExecutor(_WORKERS, thread_name_prefix="still-import")
        self._pending: deque[tuple[Future[EncodedFrame], list[PageRun]]] = deque()
        self._plain = bytearray()
        self._ram = bytearray()
        self._runs: list[PageRun] = []
        self._names: list[str] = []
        self._page_bytes = 0

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self._pool.shutdown(cancel_futures=True)

    def set_blocks(self, names: list[str], page_bytes: int) -> None:
        """Name the RAM blocks, before any page."""
        self._names = names
        self._page_bytes = page_bytes

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
        """Add pages that follow each other.

        Raises:
            SinkError: the destination cannot take a frame.
        """
        page_bytes = self._page_bytes
        if len(self._ram) + len(data) > FRAME_RAW_TARGET_BYTES * 5 // 4:
            self._end_ram()
        self._begin_run(block, offset_bytes, len(data) // page_bytes, KIND_DATA)
        self._ram += stream_writer.ram_page_record(
            offset_bytes, data[:page_bytes], block=self._names[block]
        )
        pieces: list[bytes] = []
        for start in range(page_bytes, len(data), page_bytes):
            pieces.append(_WORD.pack(offset_bytes + start | _NEXT_PAGE))
            pieces.append(data[start : start + page_bytes])
        self._ram += b"".join(pieces)

    def add_zeroes(self, block: int, offset_bytes: int, pages: int) -> None:
        """Add zero pages that follow each other.

        Raises:
            SinkError: the destination cannot take a frame.
        """
        page_bytes = self._page_bytes
        while pages:
            room = max(0, FRAME_RAW_TARGET_BYTES - len(self._ram)) // ZERO_RECORD_BYTES
            if not room:
                self._end_ram()
                continue
            count = min(pages, room)
            self._begin_run(block, offset_bytes, count, KIND_ZERO)
            self._ram += stream_writer.ram_zero_record(offset_bytes, block=self._names[block])
            words = range(
                offset_bytes + page_bytes | _NEXT_ZERO,
                offset_bytes + count * page_bytes | _NEXT_ZERO,
                page_bytes,
            )
            self._ram += b"".join([_ZERO_RECORD.pack(word, 0) for word in words])
            offset_bytes += count * page_bytes
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

    def _begin_run(self, block: int, offset_bytes: int, pages: int, kind: int) -> None:
        if not self._names:
            raise InternalError("pages came before the list of blocks")
        self._end_plain()
        if not self._ram:
            self._ram += self._prefix
        first_page = offset_bytes // self._page_bytes
        self._runs.append(PageRun(block, first_page, pages, kind, len(self._ram)))

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
