"""Which pages of the file behind a block are there, page by page.

A page that is punched out of its file (fallocate) is gone before anybody is told, and on
hugetlbfs nobody is told at all. So whoever copied a page asks afterwards whether it is still
the page of the instant. shmem: cachestat(2). hugetlbfs knows no holes, but we map the file
ourselves and take pages in by UFFDIO_CONTINUE, which fills nothing; punching takes the page out
of every mapping, and ours never gets one back, however often the page is filled anew.
Source: Linux ``mm/hugetlb.c``: hugetlb_mfill_atomic_pte; ``fs/hugetlbfs/inode.c``: hugetlbfs_punch_hole.
"""

from libc.stdint cimport uint64_t

from ._core cimport *
from ._sys cimport *


cdef inline uint64_t held_at(const Block *b, uint64_t page) noexcept nogil:
    return b.held + (page << b.shift)

cdef inline bint take_hold(const Block *b, uint64_t page) noexcept nogil:
    """Whether a page of hugetlbfs is there; from now on we see when it is punched out."""
    cdef uint64_t length = (<uint64_t>1) << b.held_shift
    cdef int rc, tries = 0
    while True:
        rc = sf_hold_page(b.held_uffd, held_at(b, page) & ~(length - 1), length)
        if rc != -EAGAIN or tries == 1000:
            return rc != -EFAULT    # doubt counts as there: it is read, and checked then
        tries += 1

cdef inline bint is_hole(const Block *b, uint64_t page) noexcept nogil:
    """Whether a page that may have come lately is not there."""
    if b.holes == HOLES_HUGETLB:
        return not take_hold(b, page)
    return sf_has_hole(b.read_fd, b.read_offset + (page << b.shift), (<uint64_t>1) << b.shift)

cdef inline bint was_punched(const Block *b, uint64_t first, uint64_t pages) noexcept nogil:
    """Whether one of these pages, which were there, was punched out since."""
    cdef uint64_t page
    if b.holes == HOLES_SHMEM:
        return sf_has_hole(b.read_fd, b.read_offset + (first << b.shift), pages << b.shift)
    if b.holes == HOLES_HUGETLB:
        for page in range(first, first + pages):
            if not sf_is_held(held_at(b, page)):
                return True
    return False
