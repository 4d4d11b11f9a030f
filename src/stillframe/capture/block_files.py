"""Our own descriptors of the files behind RAM blocks, to read RAM and to notice holes."""

from __future__ import annotations

import os
from collections.abc import Sequence

from stillframe.capture.held_file import HeldFile
from stillframe.capture.population import file_behind
from stillframe.errors import HostError
from stillframe.model import RamBlock


class BlockFiles:
    """The files behind a machine's RAM blocks, open until :meth:`close`.

    Attributes:
        readers: for each block, a descriptor of its file, or None without a file.
        held: by block number, our mapping of its file, if that is on hugetlbfs.
    """

    def __init__(self, blocks: Sequence[RamBlock], pid: int, *, guest_runs: bool) -> None:
        """Open the files; the guest is not touched.

        Args:
            guest_runs: whether the guest runs during the capture.

        Raises:
            HostError: a file cannot be opened, or its holes could not be noticed.
        """
        self.readers: list[int | None] = []
        self.held: dict[int, HeldFile] = {}
        self._fds: list[int] = []
        try:
            for block in blocks:
                self.readers.append(self._open(block, pid))
            for index, block in enumerate(blocks):
                self._hold(index, block, guest_runs)
        except BaseException:
            self.close()
            raise

    def _open(self, block: RamBlock, pid: int) -> int | None:
        if not block.shared and block.backing_fd is None and block.backing_path is None:
            return None
        try:
            # Not a duplicate, which would share the VMM's file position.
            access = os.O_RDWR if block.backing == "hugetlbfs" else os.O_RDONLY
            fd = os.open(file_behind(block, pid), access | os.O_CLOEXEC)
        except OSError as error:
            raise HostError(
                f"the memory behind {block.idstr} cannot be opened",
                why=error.strerror,
                remedy="run as root",
                guest_state="running",
            ) from error
        self._fds.append(fd)
        return fd

    def _hold(self, index: int, block: RamBlock, guest_runs: bool) -> None:
        fd = self.readers[index]
        if fd is None or block.backing != "hugetlbfs":
            return
        page_bytes = block.page_size_bytes
        length_bytes = block.pages * page_bytes
        try:
            self.held[index] = HeldFile(fd, block.backing_offset_bytes, length_bytes, page_bytes)
        except HostError:
            # Without the mapping, a page punched out of the file would go unnoticed. That does no
            # harm if the guest stands still, or if the pages are private.
            if guest_runs and block.shared:
                raise

    def open_tasks(self, pid: int) -> int:
        """Open the VMM's ``task`` directory, through which the fault thread sees what a thread is
        about to drop; -1 if that is not possible."""
        try:
            fd = os.open(f"/proc/{pid}/task", os.O_RDONLY | os.O_CLOEXEC)
        except OSError:
            return -1  # then dropping an unsaved page fails the snapshot
        self._fds.append(fd)
        return fd

    def count_used(self, index: int) -> int | None:
        """Return the size of a block's file on its file system, in units of 512 bytes; None without
        a file. For RAM protected in chunks, which may have holes anyway, only a decrease shows that
        a hole was punched."""
        fd = self.readers[index]
        return None if fd is None else os.fstat(fd).st_blocks

    def close(self) -> None:
        for held in self.held.values():
            held.close()
        self.held.clear()
        for fd in self._fds:
            os.close(fd)
        self._fds.clear()
