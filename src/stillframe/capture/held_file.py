"""Our own mapping of a hugetlbfs file, to see which of its pages exist, and keep existing.

hugetlbfs does not report holes (SEEK_HOLE, cachestat and another process's mincore are of no use),
nor when one is punched. ``_holes.pxd`` explains how this mapping does.
"""

from __future__ import annotations

import os

from stillframe.capture._capture import map_file, unmap_file
from stillframe.errors import HostError
from stillframe.kernel.userfaultfd import HELD_PAGES, own_userfaultfd


class HeldFile:
    """The mapping and its userfaultfd. Never read through it: that would fill holes."""

    def __init__(self, fd: int, offset_bytes: int, length_bytes: int, page_bytes: int) -> None:
        """Map the file; no page of it is populated or reserved.

        Args:
            fd: of the file, open for writing (UFFDIO_REGISTER requires it).
            length_bytes: rounded up to whole pages of the file.

        Raises:
            HostError: userfaultfd is not permitted, or there is no address space.
        """
        self.page_bytes = page_bytes
        self._length_bytes = -(-length_bytes // page_bytes) * page_bytes
        self._uffd = own_userfaultfd(HELD_PAGES)
        self.address = map_file(fd, self._length_bytes, offset_bytes)
        if self.address < 0:
            self._uffd.close()
            raise HostError(
                "huge pages of the VM cannot be mapped",
                why=os.strerror(-self.address),
                guest_state="running",
            )
        try:
            self._uffd.register(self.address, self._length_bytes, HELD_PAGES)
        except BaseException:
            self.close()
            raise

    def fileno(self) -> int:
        """The userfaultfd that the mapping is registered with."""
        return self._uffd.fileno()

    def close(self) -> None:
        """Unmap the file and close the userfaultfd."""
        self._uffd.close()
        unmap_file(self.address, self._length_bytes)
