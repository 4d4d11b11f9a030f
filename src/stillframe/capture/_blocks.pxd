"""RAM blocks: what Python tells of them, and reads of their bitmaps. Not on the fault path."""

from libc.stdint cimport uint32_t, uint64_t
from libc.stdlib cimport calloc
from libc.string cimport memcpy

from ._core cimport *
from ._sys cimport *


cdef inline int add_block(Core *core, uint32_t i, block) except -1:
    cdef Block *b = &core.blocks[i]
    cdef uint64_t size
    cdef bytes idstr
    hva, pages, target_pages, page_bytes, read_fd, read_offset, check_holes, idstr = block
    if page_bytes & (page_bytes - 1) or page_bytes < TARGET_PAGE or page_bytes > core.spill.slab_bytes:
        raise ValueError(f"page size {page_bytes} of block {i}")
    if len(idstr) > 255:
        raise ValueError(f"name of block {i} is longer than 255 bytes")
    b.hva = hva
    b.pages = pages
    b.target_pages = target_pages
    b.shift = sf_log2(page_bytes)
    b.read_fd = read_fd
    b.read_offset = read_offset
    b.holes = HOLES_SHMEM if check_holes else HOLES_NONE
    b.idlen = len(idstr)
    memcpy(b.idstr, <const char *>idstr, b.idlen)
    b.unit = min(64, core.spill.slab_bytes >> b.shift)
    b.units = (b.pages + b.unit - 1) // b.unit
    core.units_total += b.units
    core.wanted += b.pages << (b.shift - TARGET_SHIFT)
    size = words(b) + 1
    b.claim = <uint64_t *>calloc(size * 8, sizeof(uint64_t))
    if b.claim == NULL:
        raise MemoryError()
    b.done = b.claim + size
    b.noted = b.done + size
    b.faulted = b.noted + size
    b.populated = b.faulted + size
    b.fresh = b.populated + size
    b.removed = b.fresh + size
    b.unpinned = b.removed + size
    return 0

cdef inline void mark(uint64_t *bits, uint64_t first, uint64_t pages) noexcept nogil:
    cdef uint64_t page = first
    while page < first + pages:
        if page & 63 == 0 and page + 64 <= first + pages:
            bits[page >> 6] = ~<uint64_t>0
            page += 64
        else:
            bits[page >> 6] |= (<uint64_t>1) << (page & 63)
            page += 1

cdef inline void mark_from_pagemap(Block *b, const uint64_t *entries, uint64_t n, uint64_t first) noexcept nogil:
    """Entries of /proc/PID/pagemap, one per 4 KiB (Documentation/admin-guide/mm/pagemap.rst)."""
    cdef uint64_t i, page, entry
    cdef int step = b.shift - TARGET_SHIFT
    for i in range(n):
        entry = entries[i]
        if entry >> 63 or sf_is_swapped(entry):
            page = first + (i >> step)
            b.populated[page >> 6] |= (<uint64_t>1) << (page & 63)

cdef inline list runs_of(const uint64_t *bitmap, uint64_t pages):
    """Runs (first page, pages) of set bits."""
    cdef uint64_t word, bits, page, start = 0, end = 0
    found = []
    for word in range((pages + 63) >> 6):
        bits = sf_load(&bitmap[word])
        if bits == ~<uint64_t>0 and end == word << 6 and end > start:
            end += 64
            continue
        while bits:
            page = (word << 6) + sf_ctz(bits)
            bits &= bits - 1
            if page != end:
                if end > start:
                    found.append((start, end - start))
                start = page
            end = page + 1
    if end > start:
        found.append((start, end - start))
    return found
