"""The pages that a clone has written since its image: the kernel tracks them at no cost.

A clone maps the image privately, so the pages it wrote are its own; all others are the file's, and
so the snapshot's. That holds only while the file does not change: it must be sealed
(``RamImage.seal``), or be on disk with its inode unchanged since it was complete. A VM whose RAM is
the image itself writes into the file, and its changes cannot be detected.
"""

from __future__ import annotations

import os
from collections.abc import Mapping

from stillframe.capture.population import file_behind, private_pages
from stillframe.image.ram_image import PAGE_BYTES, is_sealed
from stillframe.model import RamBlock


class OwnPages:
    """A ``snapshot.parent.ChangedPages`` of one clone, with the image's snapshot as parent.

    Args:
        files: by block: (device, inode, change time) of the image's file, which holds exactly that
            block; the time in ns, 0 for a file in memory.
    """

    def __init__(self, pid: int, files: Mapping[str, tuple[int, int, int]]) -> None:
        self._pid = pid
        self._files = dict(files)

    def changed_pages(self, block: RamBlock) -> list[tuple[int, int]] | None:
        """Return the clone's own pages; None if the block is not a private mapping of a sealed
        image.

        Raises:
            HostError: not permitted, or the VM has exited.
        """
        file = self._files.get(block.idstr)
        if file is None or block.shared or block.page_size_bytes != PAGE_BYTES:
            return None
        if block.backing_offset_bytes or not self._is_on(block, file):
            return None
        return private_pages(self._pid, block)

    def _is_on(self, block: RamBlock, file: tuple[int, int, int]) -> bool:
        """Return whether a block maps that file, and the file is unchanged."""
        device, inode, changed_ns = file
        try:
            fd = os.open(file_behind(block, self._pid), os.O_RDONLY | os.O_CLOEXEC)
        except OSError:
            return False
        try:
            status = os.fstat(fd)
            if (status.st_dev, status.st_ino) != (device, inode):
                return False
            return status.st_ctime_ns == changed_ns if changed_ns else is_sealed(fd)
        except OSError:
            return False
        finally:
            os.close(fd)
