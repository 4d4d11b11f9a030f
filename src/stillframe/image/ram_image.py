"""The files of an image: one per RAM block, in nameless shared memory, and their pages.

UFFDIO_COPY into our own mapping places a page in a file: whole or not at all, and never a huge
page. So the kernel alone knows which pages are there, and a filler that takes over asks it
(``scan``).
"""

from __future__ import annotations

import contextlib
import ctypes
import errno
import fcntl
import os
from collections.abc import Callable, Iterable, Sequence
from itertools import compress
from typing import Self

from stillframe.errors import HostError, InternalError, RefusedError
from stillframe.image import _fill
from stillframe.kernel.userfaultfd import IMAGE_PAGES, Userfaultfd
from stillframe.model import BlockRecord
from stillframe.still.frames import BytesLike
from stillframe.still.index import KIND_DATA, Index, PageRun
from stillframe.still.records import check_run, payload_start, record_bytes
from stillframe.still.snapshot import Snapshot

PAGE_BYTES = 4096
SMALLEST_BYTES = 4 << 20
"""A smaller block is as fast through the stream."""
_SEALS = fcntl.F_SEAL_WRITE | fcntl.F_SEAL_SHRINK | fcntl.F_SEAL_GROW
_NAME = "stillframe-image"
_DEVICE = "/dev/userfaultfd"
_PUNCH_HOLE_KEEP_SIZE = 3
_STRIDE = record_bytes(KIND_DATA, PAGE_BYTES)
_libc = ctypes.CDLL(None, use_errno=True)


def memory_file(_number: int) -> int:
    """Make a block's file in nameless shared memory."""
    return os.memfd_create(_NAME, os.MFD_CLOEXEC | os.MFD_ALLOW_SEALING)


class ImageFiles:
    """A file for each of a VM's larger RAM blocks.

    Args:
        blocks: all blocks of the VM. numbers: of those in the image, in their order.
        fds: their files, owned from here on.

    Raises:
        HostError: no userfaultfd, or no memory.
    """

    def __init__(
        self, blocks: Sequence[BlockRecord], numbers: Sequence[int], fds: Sequence[int]
    ) -> None:
        self.all_blocks = tuple(blocks)
        self.numbers = tuple(numbers)
        self.fds = tuple(fds)
        self.pages: list[_fill.Pages] = []
        self._mappings: list[tuple[int, int]] = []
        self._uffd: Userfaultfd | None = None
        self.device_fd: int | None = None
        self._position = {number: position for position, number in enumerate(self.numbers)}
        try:
            # It serves only our own writes to the mapping, so the unprivileged kind will do.
            self._uffd = Userfaultfd.for_this_process(user_mode_only=True)
            self._uffd.handshake(IMAGE_PAGES)
            for number, fd in zip(self.numbers, self.fds, strict=True):
                self.pages.append(self._open(number, fd, self._uffd))
        except BaseException:
            self.close()
            raise

    @classmethod
    def make_files(cls, blocks: Sequence[BlockRecord], numbers: Sequence[int]) -> ImageFiles:
        """Make new, empty files. Raises HostError as the class does."""
        return ImageFiles(blocks, numbers, _new_files(blocks, numbers))._with_device()

    def _with_device(self) -> Self:
        with contextlib.suppress(OSError):  # only for VMs without privileges, where it is permitted
            self.device_fd = os.open(_DEVICE, os.O_RDWR | os.O_CLOEXEC)
        return self

    @property
    def inherited(self) -> tuple[int, ...]:
        """Descriptors that the VMs inherit: the files, and /dev/userfaultfd if it could be
        opened."""
        return self.fds if self.device_fd is None else (*self.fds, self.device_fd)

    def _open(self, number: int, fd: int, uffd: Userfaultfd) -> _fill.Pages:
        length_bytes = self.all_blocks[number].used_length_bytes
        if os.fstat(fd).st_size != length_bytes or length_bytes % PAGE_BYTES:
            raise InternalError("an image's file has another length than its block")
        address = _fill.map_file(fd, length_bytes)
        if address < 0:
            raise HostError("an image cannot be mapped", why=os.strerror(-address))
        self._mappings.append((address, length_bytes))
        uffd.register(address, length_bytes, IMAGE_PAGES)
        return _fill.Pages(fd, uffd.fileno(), address, length_bytes // PAGE_BYTES)

    @property
    def identities(self) -> tuple[tuple[int, int], ...]:
        """(device, inode) of each file."""
        return tuple((status.st_dev, status.st_ino) for status in map(os.fstat, self.fds))

    @property
    def blocks(self) -> tuple[BlockRecord, ...]:
        """The records of the blocks that have a file."""
        return tuple(self.all_blocks[number] for number in self.numbers)

    def position(self, number: int) -> int | None:
        """Return the position in this image of the VM's block ``number``; None if it is not in
        it."""
        return self._position.get(number)

    def place(self, raw: BytesLike, run: PageRun) -> int:
        """Place a run of data pages of a decompressed frame in its block's file; wakes nobody.

        Returns:
            How many were not there yet, or -errno; pages placed before the error stay.

        Raises:
            DataError: the frame does not hold the run.
        """
        idstr = self.all_blocks[run.block].idstr
        check_run(raw, run, idstr, PAGE_BYTES)
        start = payload_start(raw, run, idstr, PAGE_BYTES)
        pages = self.pages[self._position[run.block]]
        return pages.place(run.first_page, run.pages, raw, start, _STRIDE)

    def empty(self) -> None:
        """Drop all pages: those that a VM populated before it was watched are not the snapshot's.

        Raises:
            HostError: the kernel refuses.
        """
        for fd, (_, length_bytes) in zip(self.fds, self._mappings, strict=True):
            mode = ctypes.c_int(_PUNCH_HOLE_KEEP_SIZE)
            length = ctypes.c_int64(length_bytes)
            if _libc.fallocate(fd, mode, ctypes.c_int64(0), length) != 0:
                number = ctypes.get_errno()
                raise HostError("an image cannot be emptied", why=os.strerror(number))

    def scan(self) -> int:
        """Ask the kernel which pages are there, as after another filler; return their number.

        Raises:
            HostError: it does not tell.
        """
        found = 0
        for pages in self.pages:
            there = pages.scan()
            if there < 0:
                raise HostError("an image's pages cannot be told", why=os.strerror(-there))
            found += there
        return found

    def seal(self) -> bool:
        """Forbid all changes to the complete files, even holes, so that a page that a VM does not
        own is the snapshot's for good. Return whether that worked: not if a VM's RAM is the image
        itself. The image cannot be filled afterwards."""
        self._unmap()
        try:
            for fd in self.fds:
                fcntl.fcntl(fd, fcntl.F_ADD_SEALS, _SEALS)
        except OSError:
            return False
        return True

    def close(self) -> None:
        """Close files and mappings; VMs that map the files keep them."""
        self._unmap()
        fds, self.fds, self.device_fd = self.inherited, (), None
        for fd in fds:
            os.close(fd)

    def _unmap(self) -> None:
        if self._uffd is not None:
            self._uffd.close()
            self._uffd = None
        for address, length_bytes in self._mappings:
            _fill.unmap(address, length_bytes)
        self._mappings = []


class RamImage(ImageFiles):
    """The image of a snapshot, which the caller keeps owning; see :class:`ImageFiles`.

    Raises:
        RefusedError: the pages do not have 4096 bytes.
    """

    def __init__(self, snapshot: Snapshot, numbers: Sequence[int], fds: Sequence[int]) -> None:
        if snapshot.index.target_page_bytes != PAGE_BYTES:
            for fd in fds:
                os.close(fd)
            raise RefusedError(
                "no image of a VM whose pages are not of 4096 bytes",
                remedy="restore with --stream",
                guest_state="none",
            )
        self.snapshot = snapshot
        super().__init__(snapshot.blocks, numbers, fds)
        columns = snapshot.index.columns
        for number, pages in zip(self.numbers, self.pages, strict=True):
            entry = snapshot.index.blocks[number]
            rows = slice(entry.first_run, entry.end_run)
            pages.mark_data(columns.first_page[rows], columns.pages[rows], columns.kind[rows])

    @classmethod
    def make(
        cls,
        snapshot: Snapshot,
        numbers: Sequence[int],
        make_file: Callable[[int], int] = memory_file,
    ) -> Self:
        """Make a new, empty image.

        Args:
            make_file: opens a new, empty file in shared memory for a block.

        Raises:
            RefusedError, HostError: as for the class.
        """
        files = _new_files(snapshot.blocks, numbers, make_file)
        return cls(snapshot, numbers, files)._with_device()

    def frames(self) -> set[int]:
        """Return the frames that hold data of the image's blocks."""
        return frames_with_data(self.snapshot.index, self.numbers)

    def incomplete_frames(self) -> set[int]:
        """Return those of :meth:`frames` with missing pages, as far as known (``scan``)."""
        return {
            frame
            for number, pages in zip(self.numbers, self.pages, strict=True)
            for frame, run in self.snapshot.index.runs_of_block(number)
            if run.kind == KIND_DATA and not pages.all_there(run.first_page, run.pages)
        }

    def seal(self) -> bool:
        """Seal as ``ImageFiles.seal``, if the image is complete."""
        try:
            self.scan()
            if self.incomplete_frames():
                return False
        except HostError:
            return False
        return super().seal()


def frames_with_data(index: Index, numbers: Iterable[int]) -> set[int]:
    """Return the frames that hold data pages of these blocks."""
    found: set[int] = set()
    for number in numbers:
        entry = index.blocks[number]
        rows = slice(entry.first_run, entry.end_run)
        # KIND_DATA is 1
        found.update(compress(index.columns.frame[rows], index.columns.kind[rows]))
    return found


def _new_files(
    blocks: Sequence[BlockRecord],
    numbers: Sequence[int],
    make_file: Callable[[int], int] = memory_file,
) -> list[int]:
    fds: list[int] = []
    try:
        for number in numbers:
            fds.append(make_file(number))
            os.ftruncate(fds[-1], blocks[number].used_length_bytes)
    except OSError as error:
        for fd in fds:
            os.close(fd)
        raise HostError("no shared memory for an image", why=error.strerror) from error
    return fds


def is_sealed(fd: int) -> bool:
    """Return whether the file is sealed (``RamImage.seal``) and thus complete."""
    try:
        return fcntl.fcntl(fd, fcntl.F_GET_SEALS) & _SEALS == _SEALS
    except OSError:  # not a sealable file
        return False


def no_memory(number: int) -> HostError:
    """Return the error for a page that could not be placed, by its errno."""
    return HostError(
        "an image's page has no room in memory",
        why=os.strerror(number),
        remedy="free memory; the VM waits for its page meanwhile"
        if number == errno.ENOMEM
        else None,
        guest_state="paused",
    )
