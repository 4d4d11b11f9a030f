"""The search for a RAM block's pages that were ever populated; the others are zero and never read.

It must follow the block's protection: a page that is populated later then faults first.
Source: Linux ``Documentation/admin-guide/mm/pagemap.rst``, lseek(2) (SEEK_DATA), cachestat(2).
"""

from __future__ import annotations

import array
import errno
import os
from collections.abc import Iterator
from pathlib import Path

from stillframe.capture._capture import Capture, pages_there, private_runs
from stillframe.capture.held_file import HeldFile
from stillframe.errors import HostError
from stillframe.model import RamBlock

_ENTRY_BYTES = 8
_PAGEMAP_PAGE_BYTES = 4096
_ENTRIES_A_READ = 1 << 16
_WINDOW_BYTES = 4 << 20


def mark_populated(
    capture: Capture,
    index: int,
    block: RamBlock,
    pid: int,
    file_fd: int | None,
    held: HeldFile | None,
) -> None:
    """Tell ``capture`` which pages of block ``index`` to read.

    Args:
        file_fd: our own descriptor of the file behind the block, if it has one.
        held: our own mapping of that file, if it is on hugetlbfs and could be mapped.
    """
    if held is not None:
        capture.mark_populated_on_hugetlbfs(index, held.address, held.fileno(), held.page_bytes)
    elif file_fd is not None and block.backing != "hugetlbfs":
        _from_file(capture, index, block, file_fd)
    elif block.shared or (file_fd is not None and os.fstat(file_fd).st_blocks):
        # There is no way to tell what other mappings have populated; and a private mapping shows
        # the file's pages where it has none of its own.
        capture.mark_populated(index, 0, block.pages)
        return
    if not block.shared:
        _from_pagemap(capture, index, block, pid)


def file_behind(block: RamBlock, pid: int) -> str:
    """Return the path under /proc of the file that a block maps: the VMM's descriptor, or, if it
    keeps none (shared anonymous memory), the mapping itself (proc(5): map_files).

    Raises:
        OSError: the process is gone, or may not be inspected.
    """
    if block.backing_fd is not None:
        return f"/proc/{pid}/fd/{block.backing_fd}"
    with Path(f"/proc/{pid}/maps").open() as maps:
        for line in maps:
            mapped = line.split(maxsplit=1)[0]
            low, high = (int(part, 16) for part in mapped.split("-"))
            if low <= block.hva < high:
                return f"/proc/{pid}/map_files/{mapped}"
    raise FileNotFoundError(errno.ENOENT, "nothing is mapped there")


def _from_file(capture: Capture, index: int, block: RamBlock, fd: int) -> None:
    start = block.backing_offset_bytes
    end = start + block.pages * block.page_size_bytes
    at = start
    while at < end:
        try:
            data = os.lseek(fd, at, os.SEEK_DATA)
        except OSError as error:
            if error.errno == errno.ENXIO:
                return  # only a hole up to the end
            raise
        if data >= end:
            return
        at = end_of_data(fd, data, end)
        first = (data - start) // block.page_size_bytes
        last = (at - 1 - start) // block.page_size_bytes
        capture.mark_populated(index, first, last - first + 1)


def end_of_data(fd: int, at: int, end: int) -> int:
    """Find the end of the data at ``at`` in a shmem file: the next hole or ``end``, bytes.

    SEEK_HOLE walks page by page without giving up the CPU, not even to the real-time thread that
    serves the guest's faults: 25 ms for 3 GiB (measured, Linux 6.18; ``mm/filemap.c``:
    mapping_seek_hole_data). So windows without a hole are skipped first.
    """
    pages = _WINDOW_BYTES // _PAGEMAP_PAGE_BYTES
    while end - at > _WINDOW_BYTES and pages_there(fd, at, _WINDOW_BYTES) == pages:
        at += _WINDOW_BYTES
    return min(end, os.lseek(fd, at, os.SEEK_HOLE))


def private_pages(pid: int, block: RamBlock) -> list[tuple[int, int]]:
    """Return the runs (first page, pages), in 4 KiB pages, that a private mapping has of its own:
    written since it was mapped, even if swapped out or merged (KSM). Pages written during the call
    may be missing.

    Source: Linux ``fs/proc/task_mmu.c``: pte_to_pagemap_entry (PM_FILE is set for file pages).

    Raises:
        HostError: not permitted, or the VM has exited.
    """
    found: list[tuple[int, int]] = []
    for first, entries in _pagemap(pid, block):
        found += private_runs(entries, first)
    return found


def _from_pagemap(capture: Capture, index: int, block: RamBlock, pid: int) -> None:
    per_page = block.page_size_bytes // _PAGEMAP_PAGE_BYTES
    for first, entries in _pagemap(pid, block):
        capture.mark_populated_from_pagemap(index, entries, first // per_page)


def _pagemap(pid: int, block: RamBlock) -> Iterator[tuple[int, array.array[int]]]:
    """Yield a block's page map in parts: (number of the first 4 KiB page, entries)."""
    total = block.pages * (block.page_size_bytes // _PAGEMAP_PAGE_BYTES)
    entry = 0
    try:
        fd = os.open(f"/proc/{pid}/pagemap", os.O_RDONLY | os.O_CLOEXEC)
    except OSError as error:
        raise HostError(
            "the VM's page map cannot be read",
            why=error.strerror,
            remedy="run as root",
            guest_state="running",
        ) from error
    try:
        base = block.hva // _PAGEMAP_PAGE_BYTES * _ENTRY_BYTES
        while entry < total:
            want = min(_ENTRIES_A_READ, total - entry) * _ENTRY_BYTES
            content = os.pread(fd, want, base + entry * _ENTRY_BYTES)
            entries = array.array("Q", content)
            if not entries:
                raise HostError("the VM's page map ends too early", guest_state="running")
            yield entry, entries
            entry += len(entries)
    finally:
        os.close(fd)
