"""The files behind RAM blocks, opened anew: from them RAM is read, and holes in them are seen."""

from __future__ import annotations

import os
from collections.abc import Sequence

from stillframe.capture.held_file import HeldFile
from stillframe.capture.population import file_behind
from stillframe.errors import HostError
from stillframe.model import RamBlock


class BlockFiles:
    """Held open until :meth:`close`.

    Attributes:
        readers: by block: a descriptor of its file, or None where there is none.
        held: by the number of a block: our mapping of its file, if it is on hugetlbfs.
    """

    def __init__(self, blocks: Sequence[RamBlock], pid: int, *, guest_runs: bool) -> None:
        """Open them; nothing of the guest is touched.

        Args:
            guest_runs: while it is captured.

        Raises:
            HostError: one cannot be opened, or its holes could not be seen.
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
            # Opened anew: a duplicate would share the VMM's file position.
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
            # Without it a page that is punched out goes unseen, unless nobody runs who would do
            # so, or the pages are not the file's.
            if guest_runs and block.shared:
                raise

    def open_tasks(self, pid: int) -> int:
        """Where the fault thread sees what a thread is about to drop; -1: it cannot see."""
        try:
            fd = os.open(f"/proc/{pid}/task", os.O_RDONLY | os.O_CLOEXEC)
        except OSError:
            return -1  # then a drop of what is not saved yet fails the snapshot
        self._fds.append(fd)
        return fd

    def count_used(self, index: int) -> int | None:
        """What a block's file takes on its file system, in 512 bytes; None: it has no file. Of
        RAM that is protected in chunks, which may have holes, only this shows that one was
        punched."""
        fd = self.readers[index]
        return None if fd is None else os.fstat(fd).st_blocks

    def close(self) -> None:
        for held in self.held.values():
            held.close()
        self.held.clear()
        for fd in self._fds:
            os.close(fd)
        self._fds.clear()
