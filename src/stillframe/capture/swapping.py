"""A VM's swapped-out RAM, and the access to keep it in swap while it is copied (``_swap.pxd``)."""

from __future__ import annotations

import os
from collections.abc import Sequence
from contextlib import ExitStack, closing
from pathlib import Path

from stillframe.capture._capture import may_swap_out, pages_there
from stillframe.errors import StillframeError
from stillframe.kernel.proc_fields import read_fields
from stillframe.kernel.proc_maps import read_smaps
from stillframe.model import TARGET_PAGE_BYTES, RamBlock


class SwapAccess:
    """Descriptors of a process to see what is in swap, and to have pages reclaimed.

    Attributes:
        pagemap_fd, pidfd: for ``Capture.swap_out_again``.
        is_tight: there is no room to swap in more than the guest itself touches.
    """

    def __init__(self, pid: int, *, is_tight: bool) -> None:
        """Open the descriptors; the process is not touched.

        Raises:
            OSError: the process is gone, or access is not permitted (private RAM needs
                CAP_SYS_NICE), or the kernel (before 6.5) cannot report a file's pages in swap.
        """
        self.is_tight = is_tight
        with ExitStack() as cleanup:
            self.pidfd = os.pidfd_open(pid)
            cleanup.callback(os.close, self.pidfd)
            if result := may_swap_out(self.pidfd) or _may_ask():
                raise OSError(-result, os.strerror(-result))
            self.pagemap_fd = os.open(f"/proc/{pid}/pagemap", os.O_RDONLY | os.O_CLOEXEC)
            cleanup.callback(os.close, self.pagemap_fd)
            self._cleanup = cleanup.pop_all()

    def close(self) -> None:
        self._cleanup.close()


def _may_ask() -> int:
    with closing(os.fdopen(os.memfd_create("stillframe"), "wb")) as empty:
        return min(0, pages_there(empty.fileno(), 0, TARGET_PAGE_BYTES))


def swapped_bytes(pid: int, blocks: Sequence[RamBlock]) -> int:
    """Return how much of a VM's RAM is in swap; 0 if unknown. Quick if the host swaps nothing."""
    host = read_fields(Path("/proc/meminfo"))
    if host.get("SwapTotal", 0) <= host.get("SwapFree", 0):
        return 0
    try:
        details = list(read_smaps(pid))
    except StillframeError:
        return 0
    return sum(
        detail.swapped_bytes
        for detail in details
        if any(
            detail.vma.start < block.hva + block.max_length_bytes and block.hva < detail.vma.end
            for block in blocks
        )
    )
