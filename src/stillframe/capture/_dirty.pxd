"""Dirty tracking while armed: a write un-protects its page and notes it; what was noted is
protected again, in the downtime for the last time."""

from libc.stdint cimport int64_t, uint32_t, uint64_t
from libc.stdlib cimport realloc
from libc.string cimport memset

from ._blocks cimport mark
from ._core cimport *
from ._holes cimport is_hole
from ._pins cimport forget_pinned
from ._protection cimport protect, unprotect
from ._sys cimport *

cdef enum:
    ARMED_WINDOW = 16       # pages; more would have to be protected again in the downtime
    JOIN_GAP = 32           # pages; protecting them again costs less than one more system call

cdef struct Taken:          # runs of pages, for whoever tracks writes
    uint32_t block
    uint64_t first_page
    uint64_t pages

cdef struct TakenRuns:
    Taken *run              # NULL: nobody wants them
    uint64_t count, size


cdef inline int taken_add(TakenRuns *runs, uint32_t block, uint64_t page) noexcept nogil:
    cdef Taken *last
    if runs.count:
        last = &runs.run[runs.count - 1]
        if last.block == block and last.first_page + last.pages == page:
            last.pages += 1
            return 0
    if runs.count == runs.size:
        last = <Taken *>realloc(runs.run, 2 * runs.size * sizeof(Taken))
        if last == NULL:
            return -ENOMEM
        runs.run = last
        runs.size *= 2
    last = &runs.run[runs.count]
    last.block = block
    last.first_page = page
    last.pages = 1
    runs.count += 1
    return 0

cdef inline void note_window(Core *core, Block *b, uint64_t page, uint64_t *first, uint64_t *pages) noexcept nogil:
    """What a write to ``page`` un-protects while armed; within one word of the notes."""
    first[0] = page
    pages[0] = 1
    if core.finely:
        pages[0] = pages_ahead(b, page)
    elif b.shift == TARGET_SHIFT:
        first[0] = page & ~<uint64_t>(ARMED_WINDOW - 1)
        pages[0] = min(<uint64_t>ARMED_WINDOW, b.pages - first[0])

cdef inline uint64_t pages_ahead(Block *b, uint64_t page) noexcept nogil:
    """From this page on, the next power of two of how many were noted in one run before it: a
    guest that writes in order faults seldom."""
    cdef uint64_t behind = 0, width = 1
    while behind < ARMED_WINDOW and behind < page and has(b.noted, page - behind - 1):
        behind += 1
    while width < ARMED_WINDOW and width <= behind:
        width <<= 1
    return min(width, min(b.pages - page, 64 - (page & 63)))

cdef inline int let_pass(Core *core, Block *b, uint64_t first, uint64_t pages) noexcept nogil:
    """For the fault thread: un-protect and note; within one word of the notes; 0 or -errno.

    Noted after it is un-protected: protect_noted may take the note and protect the page at any
    moment, and an un-protect after that would go unseen. A write in between is not missed
    either, as set_phase waits for the fault's end."""
    cdef int rc = unprotect(core, b, first, pages, True)
    if rc != -EAGAIN:
        sf_fetch_or(&b.noted[first >> 6], (((<uint64_t>1) << pages) - 1) << (first & 63))
    return rc

cdef inline int64_t protect_noted(Core *core, TakenRuns *taken) noexcept nogil:
    """Protect again what was written since; the pages, or -errno."""
    cdef int64_t total = 0
    cdef int rc
    cdef uint32_t i
    await_even(&core.serving)       # a fault of before the stop is of before the stop
    for i in range(core.block_count):
        rc = _protect_noted_block(core, i, &total, taken)
        if rc < 0:
            return rc
    return total

cdef inline int _protect_noted_block(Core *core, uint32_t block, int64_t *total, TakenRuns *taken) noexcept nogil:
    cdef Block *b = &core.blocks[block]
    cdef uint64_t word, bits, gone, page, start = 0, end = 0
    cdef int rc
    cdef bint last = sf_load_sc(&core.phase) == HOLD
    for word in range(words(b)):
        if (sf_load(&b.noted[word]) | sf_load(&b.removed[word])) == 0:
            continue
        # Taken before it is protected: a write after the ioctl faults and notes anew.
        bits = sf_exchange(&b.noted[word], 0)
        total[0] += sf_popcount(bits)
        # Dropped pages stay in `removed`: the drop itself may come after this pass. In the
        # last one the guest stands still, and with it whoever drops.
        gone = sf_exchange(&b.removed[word], 0) if last else sf_load(&b.removed[word])
        bits |= gone
        if last:
            forget_pinned(b, word, gone)
        if b.holes:
            b.fresh[word] |= (bits & ~b.populated[word]) | gone
        else:
            b.populated[word] |= bits
        _capture_anew(core, b, word, bits)
        while bits:
            page = (word << 6) + sf_ctz(bits)
            bits &= bits - 1
            if taken.run != NULL:
                rc = taken_add(taken, block, page)
                if rc < 0:
                    return rc
            if end and page <= end + JOIN_GAP:
                end = page + 1
                continue
            if end:
                rc = protect(core, b, start, end - start)
                if rc < 0:
                    return rc
            start = page
            end = page + 1
    if end:
        rc = protect(core, b, start, end - start)
        if rc < 0:
            return rc
    if b.holes:
        _look_at_fresh(b)
    return 0

cdef inline void _capture_anew(Core *core, Block *b, uint64_t word, uint64_t bits) noexcept nogil:
    """What an earlier job has captured is the next job's again. While the phase is armed or hold
    nobody else looks at these; the fault thread sees them once it sees the phase active."""
    cdef uint64_t captured = bits & sf_fetch_and(&b.claim[word], ~bits)
    sf_fetch_and(&b.done[word], ~bits)
    sf_fetch_and(&b.faulted[word], ~bits)   # else the loser of a claim would not un-protect
    core.wanted += (<uint64_t>sf_popcount(captured)) << (b.shift - TARGET_SHIFT)

cdef inline void capture_nothing(Core *core, Block *b) noexcept nogil:
    """Of a block, before the first job: what is there is as an earlier snapshot has it."""
    mark(b.done, 0, b.pages)
    mark(b.claim, 0, b.pages)
    core.wanted -= b.pages << (b.shift - TARGET_SHIFT)

cdef inline void capture_range_anew(Core *core, Block *b, uint64_t first, uint64_t pages) noexcept nogil:
    cdef uint64_t page
    for page in range(first, first + pages):
        _capture_anew(core, b, page >> 6, (<uint64_t>1) << (page & 63))

cdef inline uint64_t begin_job(Core *core) noexcept nogil:
    """In hold: nobody counts or captures; how many target pages the job is to capture."""
    cdef uint64_t wanted = core.wanted, armed_faults = core.count.armed_faults
    core.wanted = core.cursor = 0
    memset(&core.count, 0, sizeof(Counters))
    core.count.armed_faults = armed_faults
    core.spill.peak = core.spill.stalls = core.spill.stall_ns = 0
    return wanted

cdef inline void _look_at_fresh(Block *b) noexcept nogil:
    """Un-protected is not yet written: a page that is still a hole, protected again, has
    never been populated, and its hole must not count as RAM that was dropped."""
    cdef uint64_t word, bits, bit
    for word in range(words(b)):
        bits = b.fresh[word]
        b.fresh[word] = 0
        while bits:
            bit = bits & (~bits + 1)
            if is_hole(b, (word << 6) + sf_ctz(bits)):
                b.populated[word] &= ~bit
            else:
                b.populated[word] |= bit
            bits ^= bit
