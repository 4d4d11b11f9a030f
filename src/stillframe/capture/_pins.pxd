"""Pages of shared memory that are punched out of their file after the instant, and not saved yet.

QEMU punches the file before it tells the kernel what a watcher hears of (``system/physmem.c``:
ram_block_discard_range), so nobody can save such a page first. But who holds the page itself still
has it as it was: after the instant it could not be written without a fault, and once it is out of
the file nobody reaches it any more. What was dropped before the instant is another page now.
"""

from libc.stdint cimport uint8_t, uint64_t

from ._core cimport *
from ._sys cimport *


cdef inline void forget_pinned(Block *b, uint64_t word, uint64_t gone) noexcept nogil:
    """At the instant: these were dropped while armed."""
    b.unpinned[word] |= gone

cdef inline bint read_pinned(const Block *b, uint64_t first, uint64_t pages, uint8_t *to) noexcept nogil:
    """Put the pages that are others by now in the place of what was read of them; False: one is lost.

    A page that was punched out reads as zeroes, and so does one that came in its place: whoever
    writes to that waits for us first. So what is not zero is the page of the instant.
    """
    cdef uint64_t page, offset
    cdef uint8_t *at
    cdef int rc
    for page in range(first, first + pages):
        at = to + ((page - first) << b.shift)
        if not sf_is_zero(at, TARGET_PAGE):
            continue
        offset = page << b.shift
        rc = 1 if (b.unpinned[page >> 6] >> (page & 63)) & 1 else sf_pins_read(b.pins, offset, at)
        if rc < 0 or rc > 0 and sf_has_hole(b.read_fd, b.read_offset + offset, TARGET_PAGE):
            return False
    return True
