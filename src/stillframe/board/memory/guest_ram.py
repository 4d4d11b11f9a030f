"""Guest RAM of this process: a memfd, mapped once, that can be write-protected.

All copies to and from it release the GIL: a write to a protected page waits for the fault thread,
which may wait for workers that need the GIL (docs/design/board.md).
"""

from __future__ import annotations

import os
import threading

from stillframe.board.memory import _guest_memory
from stillframe.errors import HostError, UsageError
from stillframe.model import TARGET_PAGE_BYTES, RamBlock

_LEAST_CHUNK_BYTES = 64 << 10
_CHUNKS = 1024
_LEAVE_S = 5.0


class GuestRam:
    """One RAM block of this process: a memfd mapped MAP_SHARED, zero at first.

    Forked children do not get the mapping, since their writes would bypass the protection. The
    mapping is a little longer than the block, for protection in chunks
    (``RamBlock.max_length_bytes``).

    Attributes:
        idstr: the block's name in the stream.
        length_bytes: how much of it the guest has.
        hva: its address in this process; 0 once closed.
        fd: the memfd; unlike the mapping, reading a hole through it populates nothing.
    """

    def __init__(self, idstr: str, length_bytes: int) -> None:
        """Make the block without populating it.

        Raises:
            UsageError: the length is not whole target pages.
            HostError: no memory or no address space for it.
        """
        if length_bytes <= 0 or length_bytes % TARGET_PAGE_BYTES:
            raise UsageError(
                f"RAM block {idstr}: {length_bytes} bytes are not whole pages of 4 KiB"
            )
        self.idstr = idstr
        self.length_bytes = length_bytes
        self._mapped_bytes = _mapped_bytes(length_bytes)
        self._users = 0
        self._users_lock = threading.Lock()
        self._no_users = threading.Condition(self._users_lock)
        self.hva = 0
        try:
            self.fd = os.memfd_create(idstr, os.MFD_CLOEXEC)
        except OSError as error:
            raise HostError(f"no memfd for RAM block {idstr}", why=error.strerror) from error
        try:
            os.ftruncate(self.fd, self._mapped_bytes)
            result = _guest_memory.map_shared(self.fd, self._mapped_bytes)
            if result < 0:
                raise OSError(-result, os.strerror(-result))
        except OSError as error:
            self.close()
            raise HostError(
                f"no room for RAM block {idstr} of {length_bytes >> 20} MiB", why=error.strerror
            ) from error
        self.hva = result

    def block(self) -> RamBlock:
        """Return the record that a capture takes."""
        return RamBlock(
            idstr=self.idstr,
            hva=self.hva,
            used_length_bytes=self.length_bytes,
            max_length_bytes=self._mapped_bytes,
            page_size_bytes=TARGET_PAGE_BYTES,
            backing="memfd",
            shared=True,
            backing_fd=self.fd,
        )

    def _at(self, offset_bytes: int, length_bytes: int) -> int:
        if not self.hva:
            raise UsageError(f"RAM block {self.idstr} is closed")
        if min(offset_bytes, length_bytes) < 0 or offset_bytes + length_bytes > self.length_bytes:
            raise UsageError(
                f"RAM block {self.idstr} has no {length_bytes} bytes at offset {offset_bytes:#x}"
            )
        return self.hva + offset_bytes

    def _enter(self, offset_bytes: int, length_bytes: int) -> int:
        """Return the address of the bytes, which stay mapped until ``_leave``."""
        with self._users_lock:
            at = self._at(offset_bytes, length_bytes)
            self._users += 1
            return at

    def _leave(self) -> None:
        with self._users_lock:
            self._users -= 1
            if not self._users:
                self._no_users.notify_all()

    def read(self, offset_bytes: int, length_bytes: int) -> bytes:
        """Copy out, without the GIL; wait for pages that are still missing (postcopy).

        Raises:
            UsageError: outside the block. The guest is not disturbed.
        """
        at = self._enter(offset_bytes, length_bytes)
        try:
            return _guest_memory.copy_out(at, length_bytes)
        finally:
            self._leave()

    def write(self, offset_bytes: int, data: bytes | bytearray | memoryview) -> None:
        """Copy in, without the GIL; wait while a protected page is being saved.

        Raises:
            UsageError: outside the block; nothing was written.
        """
        view = memoryview(data).cast("B")
        at = self._enter(offset_bytes, len(view))
        try:
            _guest_memory.copy_in(at, view)
        finally:
            self._leave()

    def read_from(
        self, fd: int, offset_bytes: int, length_bytes: int, file_offset: int | None = None
    ) -> int:
        """Let the kernel write: read(2), or pread(2) at ``file_offset``, into guest RAM.

        Works without the GIL and with any protection: on EFAULT, touch the pages and try again.
        For files and byte streams; a datagram may be lost.

        Returns:
            The bytes read: fewer at the end of the file, or what a stream had.

        Raises:
            UsageError: outside the block; nothing was written.
            OSError: from read(2).
        """
        at = self._enter(offset_bytes, length_bytes)
        try:
            got = _guest_memory.read_into(
                fd, at, length_bytes, -1 if file_offset is None else file_offset
            )
        finally:
            self._leave()
        if got < 0:
            raise OSError(-got, os.strerror(-got))
        return got

    def touch(self, offset_bytes: int, length_bytes: int) -> None:
        """Write to each page without changing it, which populates it and has its fault served.

        Raises:
            UsageError: outside the block.
        """
        at = self._enter(offset_bytes, length_bytes)
        try:
            _guest_memory.touch(at, length_bytes)
        finally:
            self._leave()

    def clear(self, offset_bytes: int, length_bytes: int) -> None:
        """Drop pages: they become zero, and missing (postcopy waits for them again).

        Do not call it while the block is captured: it bypasses the protection, and makes the
        snapshot fail.

        Raises:
            UsageError: outside the block.
            HostError: the kernel refuses.
        """
        self._enter(offset_bytes, length_bytes)
        try:
            result = _guest_memory.punch(self.fd, offset_bytes, length_bytes) if length_bytes else 0
        finally:
            self._leave()
        if result < 0:
            raise HostError(f"cannot clear RAM block {self.idstr}", why=os.strerror(-result))

    def close(self) -> None:
        """Unmap and close. No vCPU may use the block any more.

        Wait for copies in progress. If one does not end in time, since its page never comes, the
        mapping stays until the process ends.
        """
        with self._users_lock:
            hva, self.hva = self.hva, 0
            unused = self._no_users.wait_for(lambda: not self._users, _LEAVE_S)
        if hva and unused:
            _guest_memory.unmap(hva, self._mapped_bytes)
        if self.fd >= 0:
            os.close(self.fd)
            self.fd = -1


def _mapped_bytes(length_bytes: int) -> int:
    """Return the length rounded up to at most 1024 chunks, each of at least 64 KiB."""
    chunk = _LEAST_CHUNK_BYTES
    while chunk * _CHUNKS < length_bytes:
        chunk *= 2
    return -(-length_bytes // chunk) * chunk
