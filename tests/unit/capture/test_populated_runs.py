"""What is populated, in target pages however large a block's own pages are."""

from __future__ import annotations

import ctypes
import mmap
import os

import pytest

from stillframe.capture.ram_capture import RamCapture
from stillframe.kernel.userfaultfd import Userfaultfd
from stillframe.model import RamBlock
from tests.support.probes import has_uffd_wp

HUGE = 2 << 20
TARGET_PAGES = HUGE // 4096


@pytest.mark.parametrize("page_bytes", [4096, HUGE])
def test_runs_are_in_target_pages(page_bytes: int) -> None:
    has_uffd_wp().require()
    memory = mmap.mmap(-1, 5 * HUGE, mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    memory.madvise(mmap.MADV_NOHUGEPAGE)
    start = -(-ctypes.addressof(ctypes.c_char.from_buffer(memory)) // HUGE) * HUGE
    block = RamBlock(
        idstr="pc.ram",
        hva=start,
        used_length_bytes=3 * HUGE + 4096,  # its last page is not whole
        max_length_bytes=4 * HUGE,
        page_size_bytes=page_bytes,
        backing="anonymous",
    )
    for touched in (HUGE, 3 * HUGE):
        ctypes.memset(start + touched, 1, 1)
    with Userfaultfd.for_this_process() as uffd:
        ram = RamCapture(uffd, os.getpid(), [block], spill_bytes=1 << 20)
        try:
            ram.learn_population()
            (runs,) = ram.populated_runs()
        finally:
            ram.close()
    filled = 1 if page_bytes == 4096 else TARGET_PAGES
    assert runs == [(TARGET_PAGES, filled), (3 * TARGET_PAGES, 1)]
