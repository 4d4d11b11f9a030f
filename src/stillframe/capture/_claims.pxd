"""Claim, copy, mark done, un-protect: the way of a page out of guest RAM, for the fault thread
and for the sweep alike. In this order, so a page that can be written again has been copied
before (invariant 2)."""

from libc.stdint cimport int64_t, uint8_t, uint32_t, uint64_t

from ._core cimport *
from ._holes cimport was_punched
from ._pins cimport read_pinned
from ._protection cimport unprotect
from ._swap cimport swap_out, swapped_out
from ._sys cimport *


cdef inline int _copy(Core *core, Block *b, uint64_t first, uint64_t pages, uint8_t *to) noexcept nogil:
    cdef uint64_t length = pages << b.shift
    cdef uint64_t offset = first << b.shift
    cdef uint64_t got = 0
    cdef int64_t n
    while got < length:
        if b.read_fd >= 0:
            n = sf_pread(b.read_fd, to + got, length - got, b.read_offset + offset + got)
        else:
            n = sf_read_process(core.pid, to + got, b.hva + offset + got, length - got)
        if n == -EINTR:
            continue
        if n == -EFAULT or (n == 0 and b.read_fd >= 0):
            # Nothing is mapped there any more, or its file was cut off.
            lost(core, GONE_UNMAPPED if n else GONE_HOLE, b.hva + offset + got, length - got)
            return 0
        if n <= 0:
            return <int>n if n < 0 else -EIO
        got += n
    # These pages were populated at the instant; a hole means that they were
    # punched out before the copy, so zeros would be silently wrong.
    if b.pins != NULL:
        if not read_pinned(b, first, pages, to):
            lost(core, GONE_HOLE, b.hva + offset, length)
    elif b.holes and was_punched(b, first, pages):
        lost(core, GONE_HOLE, b.hva + offset, length)
    return 0

cdef inline void _append(Core *core, Slab *slab, uint32_t block, uint64_t first, uint64_t pages, int kind) noexcept nogil:
    cdef Block *b = &core.blocks[block]
    cdef Run *last
    cdef uint64_t at = slab.used
    cdef int rc
    if kind == KIND_DATA:
        sf_assert(at + (pages << b.shift) <= core.spill.slab_bytes)
        rc = _copy(core, b, first, pages, slab.data + at)
        if rc < 0:
            fail(core, rc)
        slab.used += pages << b.shift
    else:
        slab.absent += pages << (b.shift - TARGET_SHIFT)
    if slab.runs:
        last = &slab.run[slab.runs - 1]
        if last.block == block and last.kind == <uint32_t>kind and last.first_page + last.pages == first:
            last.pages += pages
            return
    sf_assert(slab.runs < MAX_RUNS)
    last = &slab.run[slab.runs]
    last.block = block
    last.kind = kind
    last.first_page = first
    last.pages = pages
    last.data_offset = at
    slab.runs += 1

cdef inline int _ones(uint64_t bits, int at) noexcept nogil:
    """How many bits are set in a row from ``at`` on."""
    cdef uint64_t rest = ~(bits >> at)
    return min(64 - at, sf_ctz(rest)) if rest else 64

cdef inline uint64_t _above(int at) noexcept nogil:
    return ~<uint64_t>0 << at if at < 64 else 0

cdef inline void _release(Core *core, Block *b, uint64_t first, uint64_t pages, bint by_fault) noexcept nogil:
    # Not registered any more: something else was mapped over it, so what was copied may
    # be of that. (When we give up we unregister it ourselves.)
    cdef int rc = unprotect(core, b, first, pages, by_fault)
    if rc == -EAGAIN and by_fault:
        core.blocked = True
    elif rc == -ENOENT and sf_load_sc(&core.phase) == ACTIVE:
        lost(core, GONE_UNMAPPED, b.hva + (first << b.shift), pages << b.shift)

cdef inline uint64_t capture_range(Core *core, uint32_t block, uint64_t first, uint64_t pages,
                                   Slab *slab, bint by_fault) noexcept nogil:
    """Claim, copy, mark done, un-protect (unless RAM stays armed, but for a fault); returns how
    many pages were won."""
    cdef Block *b = &core.blocks[block]
    cdef uint64_t page = first, end = first + pages
    cdef uint64_t word, mask, won, same, swapped, total = 0
    cdef uint64_t open_start = 0, open_end = 0
    cdef int at, run, kind
    sf_assert(end <= b.pages)
    while page < end:
        word = page >> 6
        mask = ~<uint64_t>0 << (page & 63)
        if end - (word << 6) < 64:
            mask &= ((<uint64_t>1) << (end - (word << 6))) - 1
        page = (word + 1) << 6
        # The claim: whoever turns the bit from 0 to 1 copies the page, nobody else.
        won = mask & ~sf_fetch_or(&b.claim[word], mask)
        if won == 0:
            continue
        swapped = 0 if by_fault else swapped_out(core, b, word, won)
        mask = won
        while mask:
            at = sf_ctz(mask)
            kind = KIND_DATA if (b.populated[word] >> at) & 1 else KIND_ZERO
            same = b.populated[word] if kind == KIND_DATA else ~b.populated[word]
            run = _ones(mask & same, at)
            _append(core, slab, block, (word << 6) + at, run, kind)
            mask &= _above(at + run)
        total += sf_popcount(won)
        if by_fault:
            sf_fetch_or(&b.faulted[word], won)
            # It will be un-protected. Nobody takes notes before the phase has changed, and
            # set_phase waits for this fault's end.
            sf_fetch_or(&b.noted[word], won)
        else:
            await_even(&core.reading)       # see _events
        # Release: a loser that sees `done` may un-protect; the copy is complete.
        sf_fetch_or(&b.done[word], won)
        if swapped:                         # nobody waits for this
            swap_out(core, b, word, swapped)
        if core.staying and not by_fault:
            continue
        mask = won
        while mask:
            at = sf_ctz(mask)
            run = _ones(mask, at)
            if open_end and open_end == (word << 6) + at:
                open_end += run
            else:
                if open_end:
                    _release(core, b, open_start, open_end - open_start, by_fault)
                open_start = (word << 6) + at
                open_end = open_start + run
            mask &= _above(at + run)
    if open_end:
        _release(core, b, open_start, open_end - open_start, by_fault)
    sf_fetch_add(&core.count.pages_done, total << (b.shift - TARGET_SHIFT))
    return total

cdef inline bint sweep(Core *core, Slab *slab, int64_t *pending) noexcept nogil:
    """Capture the next units in address order until the slab is full; False at the end."""
    cdef uint64_t unit, first, pages
    cdef uint64_t slab_bytes = core.spill.slab_bytes
    cdef uint32_t i
    cdef Block *b
    slab.used = slab.absent = slab.runs = 0
    while True:
        if slab_bytes - slab.used < slab_bytes // 4 and slab.used:
            return True
        if slab.absent + 64 * 512 > MAX_ABSENT or slab.runs + 66 > MAX_RUNS:
            return True
        # The cursor only spreads the work; the claim decides who copies.
        if pending[0] >= 0:
            unit = pending[0]
        else:
            unit = sf_fetch_add(&core.cursor, 1)
            if unit >= core.units_total:
                return slab.runs > 0
        pending[0] = unit
        i = 0
        while unit >= core.blocks[i].units:
            unit -= core.blocks[i].units
            i += 1
        b = &core.blocks[i]
        first = unit * b.unit
        pages = min(b.unit, b.pages - first)
        if slab.used + (pages << b.shift) > slab_bytes:
            return True             # it opens this worker's next batch
        pending[0] = -1
        capture_range(core, i, first, pages, slab, False)
