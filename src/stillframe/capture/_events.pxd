"""The kernel's messages: faults are queued, and RAM that is dropped or unmapped is noted.

Reading the event of a drop lets it happen: the kernel holds the dropping thread until then. So
``drops_begun`` looks beforehand what is about to be dropped, and the fault thread saves it
first. Events are handled within ``pump``, before the fault thread does anything else, and a
worker marks its pages done only when no ``pump`` is under way: a page that was dropped before
its copy was complete is never taken for done.
Source: Linux ``mm/madvise.c``: madvise_dontneed_free, ``fs/userfaultfd.c``: userfaultfd_remove.
"""

from libc.stdint cimport int64_t, uint32_t, uint64_t

from ._core cimport *
from ._sys cimport *

cdef enum:
    EVENT_PAGEFAULT = 0x12
    EVENT_REMAP = 0x14
    EVENT_REMOVE = 0x15
    EVENT_UNMAP = 0x16
    MOST_DROPS = 16
    NONE_PENDING = -1
    DROP_WAIT_NS = 200000000    # the dropping thread may wait for a processor before it sleeps


cdef inline int pump(Core *core) noexcept nogil:
    """Read messages; 0, or -errno."""
    cdef int64_t n
    cdef uint32_t i, count, room
    cdef int rc = 0
    cdef uint64_t phase
    cdef sf_uffd_msg *msg
    if core.queue_head:
        for i in range(core.queue_head, core.queue_tail):
            core.queue[i - core.queue_head] = core.queue[i]
        core.queue_tail -= core.queue_head
        core.queue_head = 0
    room = MESSAGES - core.queue_tail
    if room == 0:
        return 0
    # reading before phase, both sequentially consistent: see set_phase.
    sf_store_sc(&core.reading, core.reading + 1)
    phase = sf_load_sc(&core.phase)
    if phase == ACTIVE and core.task_fd >= 0:
        room = 1                    # no event that came after we looked for one
    n = read(core.uffd, &core.queue[core.queue_tail], room * sizeof(sf_uffd_msg))
    if n < 0:
        rc = 0 if errno == EAGAIN or errno == EINTR else -errno
        n = 0
    count = <uint32_t>(n // <int64_t>sizeof(sf_uffd_msg))
    msg = &core.queue[core.queue_tail]
    for i in range(count):
        if msg[i].event == EVENT_PAGEFAULT:
            core.queue[core.queue_tail] = msg[i]
            core.queue_tail += 1
        elif msg[i].event == EVENT_REMOVE:
            _range_gone(core, phase, GONE_REMOVED, msg[i].arg0, msg[i].arg1)
        elif msg[i].event == EVENT_UNMAP:
            _range_gone(core, phase, GONE_UNMAPPED, msg[i].arg0, msg[i].arg1)
        elif msg[i].event == EVENT_REMAP:
            _range_gone(core, phase, GONE_UNMAPPED, msg[i].arg0, msg[i].arg0 + msg[i].arg2)
    sf_store_sc(&core.reading, core.reading + 1)
    return rc

cdef inline bint part_of(const Block *b, uint64_t start, uint64_t end, uint64_t *first, uint64_t *past) noexcept nogil:
    """The pages of a block that a range of addresses touches."""
    cdef uint64_t low = max(start, b.hva), high = min(end, b.hva + (b.pages << b.shift))
    if low >= high:
        return False
    first[0] = (low - b.hva) >> b.shift
    past[0] = ((high - 1 - b.hva) >> b.shift) + 1
    return True

cdef inline bint is_unsaved(const Block *b, uint64_t page) noexcept nogil:
    return not has(b.done, page) and (b.populated[page >> 6] >> (page & 63)) & 1

cdef inline void _range_gone(Core *core, uint64_t phase, uint64_t kind, uint64_t start, uint64_t end) noexcept nogil:
    """RAM is dropped or was unmapped behind us: wrong only for pages not yet copied."""
    cdef uint32_t i
    cdef uint64_t page, first = 0, past = 0
    cdef Block *b
    if phase == RELEASE:
        return
    for i in range(core.block_count):
        b = &core.blocks[i]
        if not part_of(b, start, end, &first, &past):
            continue
        if phase == HOLD or (kind != GONE_REMOVED and (phase == ARMED or core.staying)):
            lost(core, kind, b.hva + (first << b.shift), (past - first) << b.shift)
            return
        for page in range(first, past):
            if phase == ACTIVE and is_unsaved(b, page):
                lost(core, kind, b.hva + (page << b.shift), (past - page) << b.shift)
                return
            # Before an instant the guest may give pages up; but with an anonymous page its
            # protection goes too, so it is protected anew at the instant. And it has changed.
            sf_fetch_or(&b.removed[page >> 6], (<uint64_t>1) << (page & 63))

cdef inline int drops_begun(Core *core, sf_drop *drops) noexcept nogil:
    """What threads of the process are about to drop, once the event is read; how many ranges.
    NONE_PENDING: no event waits, and one that comes now must not be read before it is looked at."""
    cdef int found
    cdef uint64_t tries = 32, began
    if core.task_fd < 0 or core.by_signal:
        return 0
    began = sf_now_ns()
    while sf_event_pending(core.uffd):
        found = sf_drops_begun(core.task_fd, &core.drop_tid, drops, MOST_DROPS)
        # None at all is an unmapping, of which nothing can be saved.
        if found or sf_now_ns() - began > DROP_WAIT_NS:
            return found
        sf_wait_briefly(tries)
        tries += 1
    return NONE_PENDING

cdef inline bint saved_already(Core *core, const sf_drop *drops, int count) noexcept nogil:
    cdef uint32_t i
    cdef int n
    cdef uint64_t page, first = 0, past = 0
    for n in range(count):
        for i in range(core.block_count):
            if part_of(&core.blocks[i], drops[n].start, drops[n].end, &first, &past):
                for page in range(first, past):
                    if is_unsaved(&core.blocks[i], page):
                        return False
    return True
