"""What the workers swap in they swap out again, so a VM keeps the memory that it has.

What we read of a VM that swaps is charged to the VM's memory cgroup. Faster than the kernel can
reclaim it that gets the VM killed, and what is reclaimed is the guest's working set. So a worker
notes which of the pages that it has claimed are in swap, and reclaims just these once they are
copied: few have to be written, since the kernel keeps their place in swap. The fault thread does
not: what the guest touches is in memory then. Source: Linux ``mm/madvise.c``: madvise_pageout (of
pages that nobody else has mapped), pagemap.rst.
"""

from libc.stdint cimport uint64_t

from ._core cimport *
from ._sys cimport *


cdef inline uint64_t swapped_out(const Core *core, const Block *b, uint64_t word, uint64_t claimed) noexcept nogil:
    """Those of 64 pages that were claimed, in a word of the bitmaps, that are in swap."""
    cdef uint64_t first = word << 6
    cdef uint64_t pages = min(<uint64_t>64, b.pages - first)
    if core.pagemap_fd < 0 or b.shift != TARGET_SHIFT or not b.populated[word] & claimed:
        return 0
    claimed &= b.populated[word]
    if b.read_fd < 0:
        return claimed & sf_in_swap(core.pagemap_fd, b.hva + (first << b.shift), pages)
    if b.looked_at == 0:
        return 0
    return claimed & sf_file_in_swap(b.read_fd, b.read_offset + (first << b.shift), pages)

cdef inline void swap_out(const Core *core, const Block *b, uint64_t word, uint64_t swapped) noexcept nogil:
    """Reclaim what ``swapped_out`` told of, after its copy. Whatever is refused stays in memory."""
    cdef uint64_t offset = word << 6 << b.shift
    if b.read_fd >= 0:
        sf_swap_out_file(b.looked_at + offset, swapped)
    else:
        sf_swap_out_process(core.pidfd, b.hva + offset, swapped)
