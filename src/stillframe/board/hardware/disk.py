"""A raw disk file with a write-back cache, for one thread at a time.

The cache is small, because a stop of the board writes it back within the downtime.
"""

from __future__ import annotations

import errno
import os
from collections.abc import Sequence

from stillframe.board.hardware.layout import SECTOR_BYTES
from stillframe.board.memory.guest_ram import GuestRam
from stillframe.errors import HostError

BLOCK_BYTES = 4096
CACHE_LIMIT_BYTES = 256 << 10
_SECTORS_PER_BLOCK = BLOCK_BYTES // SECTOR_BYTES
_MOST_VECTORS = 512


class Disk:
    """A disk of 512-byte sectors. All methods that touch the file may raise OSError."""

    def __init__(self, path: str) -> None:
        """
        Raises:
            HostError: it cannot be opened for reading and writing.
        """
        self.path = path
        self._fd = -1
        self._cache: dict[int, bytes] = {}
        self.open()
        self.sectors = os.lseek(self._fd, 0, os.SEEK_END) // SECTOR_BYTES

    def open(self) -> None:
        """Open the file, if it was given up.

        Raises:
            HostError: it cannot be opened.
        """
        if self._fd >= 0:
            return
        try:
            self._fd = os.open(self.path, os.O_RDWR | os.O_CLOEXEC)
        except OSError as error:
            raise HostError(f"the disk {self.path} cannot be opened", why=error.strerror) from error

    def close(self) -> None:
        """Give the file up, and discard what the cache still holds: write it back before."""
        self._cache.clear()
        if self._fd >= 0:
            os.close(self._fd)
            self._fd = -1

    @property
    def active(self) -> bool:
        return self._fd >= 0

    @property
    def dirty_bytes(self) -> int:
        """How much the file does not have yet."""
        return len(self._cache) * BLOCK_BYTES

    def read(self, sector: int, count: int, ram: GuestRam, offset_bytes: int) -> None:
        """Read sectors into guest RAM; the kernel copies straight there."""
        self._write_back(self._cached(sector, count))
        start, left_bytes = sector * SECTOR_BYTES, count * SECTOR_BYTES
        while left_bytes:
            got = ram.read_from(self._descriptor(), offset_bytes, left_bytes, start)
            if got <= 0:
                raise OSError(errno.EIO, "the disk file is shorter than it was")
            start, offset_bytes, left_bytes = start + got, offset_bytes + got, left_bytes - got

    def write(self, sector: int, data: bytes) -> None:
        """Put whole sectors into the cache; the file gets them later."""
        view = memoryview(data)
        block, first = divmod(sector, _SECTORS_PER_BLOCK)
        at = first * SECTOR_BYTES
        while view:
            part = view[: BLOCK_BYTES - at]
            self._cache[block] = (
                bytes(part) if len(part) == BLOCK_BYTES else self._merged(block, at, part)
            )
            view = view[len(part) :]
            block, at = block + 1, 0
        if self.dirty_bytes > CACHE_LIMIT_BYTES:
            self.drain()

    def _merged(self, block: int, at: int, part: memoryview) -> bytes:
        old = self._cache.get(block)
        if old is None:
            old = os.pread(self._descriptor(), BLOCK_BYTES, block * BLOCK_BYTES)
        # The last block of a file may be short; it must not grow.
        end = max(len(old), at + len(part))
        merged = bytearray(old.ljust(end, b"\0"))
        merged[at : at + len(part)] = part
        return bytes(merged)

    def drain(self) -> None:
        """Write the cache back."""
        self._write_back(sorted(self._cache))

    def flush(self) -> None:
        """Write the cache back, and the file to its medium."""
        self.drain()
        os.fdatasync(self._descriptor())

    def _cached(self, sector: int, count: int) -> list[int]:
        if not self._cache:
            return []
        first = sector // _SECTORS_PER_BLOCK
        last = (sector + count - 1) // _SECTORS_PER_BLOCK
        return [block for block in range(first, last + 1) if block in self._cache]

    def _write_back(self, blocks: Sequence[int]) -> None:
        for run in _runs(blocks):
            parts = [self._cache[block] for block in run]
            _write_all(self._descriptor(), parts, run[0] * BLOCK_BYTES)
            for block in run:
                del self._cache[block]

    def _descriptor(self) -> int:
        if self._fd < 0:
            raise OSError(errno.EBADF, "the disk belongs to another machine now")
        return self._fd


def _runs(blocks: Sequence[int]) -> list[list[int]]:
    """Split ascending blocks into runs without a gap, of at most ``_MOST_VECTORS`` blocks."""
    runs: list[list[int]] = []
    for block in blocks:
        if runs and runs[-1][-1] + 1 == block and len(runs[-1]) < _MOST_VECTORS:
            runs[-1].append(block)
        else:
            runs.append([block])
    return runs


def _write_all(fd: int, parts: Sequence[bytes], offset_bytes: int) -> None:
    wanted = sum(map(len, parts))
    written = os.pwritev(fd, parts, offset_bytes)
    if written < wanted:
        rest = memoryview(b"".join(parts))[written:]
        while rest:
            offset_bytes += written
            written = os.pwrite(fd, rest, offset_bytes)
            if not written:
                raise OSError(errno.EIO, "the disk file takes no more")
            rest = rest[written:]
