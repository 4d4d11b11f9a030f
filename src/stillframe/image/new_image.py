"""A complete image being made on disk: pages come in any order, from any thread; the rest are
holes."""

from __future__ import annotations

import contextlib
import datetime
import errno
import os
import shutil
import threading
from collections.abc import Sequence
from pathlib import Path
from typing import Self

from stillframe.errors import RefusedError
from stillframe.image import _fill
from stillframe.image.cached import ImageCache, does_not_fit
from stillframe.image.ram_image import PAGE_BYTES, SMALLEST_BYTES
from stillframe.image.stored import ImageRecord, StoredBlock, block_name
from stillframe.model import BlockRecord, Manifest
from stillframe.still.frames import BytesLike
from stillframe.still.index import KIND_DATA, PageRun
from stillframe.still.records import payload_start, record_bytes
from stillframe.store.backends.oserrors import sink_error

_STRIDE = record_bytes(KIND_DATA, PAGE_BYTES)
_FREE_BYTES = 64 << 20
"""Space that an image leaves free for the snapshot, if on the same disk, and other programs."""


def why_no_image(*, vmm: str, encrypted: bool, for_analysis: bool) -> str | None:
    """Return why a snapshot cannot have a complete image; None if it can."""
    if encrypted:
        return "its RAM would lie on the disk in the clear"
    if for_analysis:
        return "a snapshot for analysis is never restored"
    if vmm == "board":
        return "boards do not run on one"
    return None


def cached_blocks(blocks: Sequence[BlockRecord]) -> list[int]:
    """Return the numbers of the blocks that an image on disk holds: the same as one in memory may
    hold."""
    return [
        number
        for number, block in enumerate(blocks)
        if block.page_size_bytes == PAGE_BYTES
        and block.used_length_bytes >= SMALLEST_BYTES
        and block.used_length_bytes % PAGE_BYTES == 0
    ]


class NewImage:
    """An image being made. ``commit`` names it; ``close`` without that removes it.

    Args:
        blocks: all blocks of the VM.

    Raises:
        RefusedError: an image can hold none of them.
        SinkError: not permitted, or the disk is full. HostError: not permitted.
    """

    def __init__(self, cache: ImageCache, blocks: Sequence[BlockRecord]) -> None:
        self._cache = cache
        self._blocks = tuple(blocks)
        if not cached_blocks(blocks):
            raise RefusedError(
                "no image of a VM without RAM that one can hold",
                why=f"it is on huge pages, or each block is below {SMALLEST_BYTES >> 20} MiB",
                guest_state="none",
            )
        cache.sweep()  # leftovers take space, and this image may never get to its commit
        self._limit_bytes = cache.limit_bytes
        self._written_bytes = 0
        self._counting = threading.Lock()
        self._path, self._lock = cache.new_directory()
        self.fds: dict[int, int] = {}
        try:
            for number in cached_blocks(blocks):
                flags = os.O_RDWR | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC
                self.fds[number] = os.open(self._path / block_name(number), flags, 0o600)
                os.ftruncate(self.fds[number], blocks[number].used_length_bytes)
        except OSError as error:
            self.close()
            raise sink_error("make an image in", str(cache.directory), error) from error

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_error: object) -> None:
        self.close()

    def write(
        self, raw: BytesLike, run: PageRun, *, block: int, part: tuple[int, int] | None = None
    ) -> None:
        """Write a run of data pages of a decompressed frame.

        Args:
            block: number of the block, one of ``fds``.
            part: (first page, pages) to write; None: the whole run.

        Raises:
            DataError: the frame does not hold the run. SinkError: the disk is full, or fails.
            RefusedError: it exceeds the limit of all images.
        """
        first, pages = part or (run.first_page, run.pages)
        self._check_room(block, pages * PAGE_BYTES)
        start = payload_start(raw, run, self._blocks[block].idstr, PAGE_BYTES)
        start += (first - run.first_page) * _STRIDE
        rc = _fill.write_pages(self.fds[block], first, pages, raw, start, _STRIDE)
        if rc < 0:
            error = OSError(-rc, os.strerror(-rc))
            raise sink_error("write an image to", str(self._cache.directory), error)

    def _check_room(self, block: int, more_bytes: int) -> None:
        with self._counting:
            self._written_bytes += more_bytes
            written_bytes = self._written_bytes
        if written_bytes > self._limit_bytes:
            raise does_not_fit(written_bytes, self._limit_bytes)
        try:
            there = os.fstatvfs(self.fds[block])
            if there.f_bavail * there.f_frsize < _FREE_BYTES + more_bytes:
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        except OSError as error:
            raise sink_error("write an image to", str(self._cache.directory), error) from error

    def give_up(self) -> None:
        """Free its disk space, as it has failed. Any thread may still write."""
        for fd in self.fds.values():
            with contextlib.suppress(OSError):
                os.ftruncate(fd, 0)

    def commit(
        self, snapshot_id: str, snapshot: str, manifest: Manifest, *, content_id: str = ""
    ) -> bool:
        """Sync all files, make room, and name the image.

        Args:
            snapshot: where the snapshot is. content_id: id of the frames, if not the snapshot's.

        Returns:
            False if that snapshot has an image already.

        Raises:
            RefusedError: it does not fit in the cache's limit. SinkError, HostError: the disk
                fails.
        """
        size_bytes, blocks = 0, []
        try:
            for number, fd in self.fds.items():
                os.fsync(fd)
                status = os.fstat(fd)
                size_bytes += status.st_blocks * 512
                stored = StoredBlock(
                    number=number,
                    idstr=self._blocks[number].idstr,
                    length_bytes=status.st_size,
                    changed_ns=status.st_ctime_ns,
                )
                blocks.append(stored)
        except OSError as error:
            raise sink_error("write an image to", str(self._cache.directory), error) from error
        self._cache.make_room(size_bytes, keep=snapshot_id)
        machine = manifest.machine
        record = ImageRecord(
            snapshot_id=snapshot_id,
            content_id=content_id or snapshot_id,
            snapshot=snapshot,
            vm="" if machine is None else machine.name,
            created=datetime.datetime.now(datetime.UTC).isoformat(timespec="milliseconds"),
            size_bytes=size_bytes,
            blocks=tuple(blocks),
        )
        made = self._cache.publish(self._path, self._lock, record)
        if made:
            self._path = Path()
        self.close()
        return made

    def close(self) -> None:
        """Remove the image if it has no name yet."""
        for fd in self.fds.values():
            os.close(fd)
        self.fds = {}
        if self._path != Path():
            shutil.rmtree(self._path, ignore_errors=True)
            self._path = Path()
        if self._lock >= 0:
            os.close(self._lock)
            self._lock = -1
