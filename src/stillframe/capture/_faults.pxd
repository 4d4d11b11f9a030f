"""The fault thread. Once armed it never takes the GIL, allocates, or talks to anybody
(invariant 3); before RAM is dropped it looks into /proc at what is dropped."""

from libc.stdint cimport int64_t, uint32_t, uint64_t

from ._claims cimport capture_range
from ._core cimport *
from ._dirty cimport let_pass, note_window, pages_ahead
from ._events cimport MOST_DROPS, NONE_PENDING, drops_begun, is_unsaved, part_of, pump, saved_already
from ._protection cimport unprotect, wake
from ._spill cimport begin_slab, current_slab, hand_on, ring_take
from ._sys cimport *


cdef inline int fault_loop(Core *core) noexcept nogil:
    cdef pollfd fds[3]
    cdef int rc
    cdef uint64_t address, phase, tries, asked
    fds[0].fd = core.uffd
    fds[0].events = POLLIN
    fds[1].fd = core.stop_fd
    fds[1].events = POLLIN
    fds[2].fd = core.spill.asked_fd
    fds[2].events = POLLIN
    sf_store(&core.looping, 1)
    while True:
        if core.queue_head == core.queue_tail:
            if poll(fds, 3, -1) < 0:
                if errno == EINTR:
                    continue
                rc = -errno
                fail(core, rc)
                return rc
            if fds[1].revents:
                return 0
            if fds[2].revents & POLLIN:     # somebody waits for what lies in our slab
                read(core.spill.asked_fd, &asked, 8)
                hand_on(&core.spill)
            if fds[0].revents & POLLIN:
                rc = _read_messages(core, False)
                if rc < 0:
                    fail(core, rc)
                    return rc
            elif fds[0].revents & (POLLERR | POLLHUP | POLLNVAL):
                fail(core, -ESRCH)
                return -ESRCH
            continue
        address = core.queue[core.queue_head].arg1
        core.queue_head += 1
        tries = 0
        while True:
            # serving before phase, both sequentially consistent: see set_phase. The phase is
            # read once: a fault that was let in by one is not served under the next.
            sf_store_sc(&core.serving, core.serving + 1)
            phase = sf_load_sc(&core.phase)
            if phase == HOLD:
                rc = -EAGAIN
            else:
                rc = _fault(core, address, phase)
            sf_store_sc(&core.serving, core.serving + 1)
            if rc != -EAGAIN:
                break
            _read_messages(core, True)  # an unread event keeps everybody from (un)protecting
            # The job's thread, or the one that drops RAM, must get on.
            sf_wait_briefly(64 if phase == HOLD else tries)
            tries += 1

cdef inline int _read_messages(Core *core, bint event_only) noexcept nogil:
    """As ``pump``, once what is about to be dropped is saved.

    An event that comes between the look and the read would be read too early; so nothing is read
    unless an event that was looked at, or a fault, is there. Only this thread wakes who waits in a
    fault (``unprotect``), so a fault that ``poll`` has told of is still there."""
    cdef sf_drop drops[MOST_DROPS]
    cdef int count = 0
    # As a fault: who switches the phase waits until what was claimed here is saved.
    sf_store_sc(&core.serving, core.serving + 1)
    if sf_load_sc(&core.phase) == ACTIVE:
        count = drops_begun(core, drops)
        if count > 0:
            _save(core, drops, count)
    sf_store_sc(&core.serving, core.serving + 1)
    if event_only and count == NONE_PENDING:
        return 0
    return pump(core)

cdef inline void _save(Core *core, const sf_drop *drops, int count) noexcept nogil:
    """Save pages that are about to be dropped. They are not un-protected: while the event is
    unread that cannot be done, and they go anyway."""
    cdef uint32_t i
    cdef int n
    cdef uint64_t page, pages, most, tries, first = 0, past = 0
    cdef Block *b
    cdef Slab *slab
    for n in range(count):
        for i in range(core.block_count):
            b = &core.blocks[i]
            if not part_of(b, drops[n].start, drops[n].end, &first, &past):
                continue
            most = max(<uint64_t>1, min(<uint64_t>64, core.max_window_bytes >> b.shift))
            page = first
            while page < past:
                if not is_unsaved(b, page):
                    page += 1
                    continue
                pages = 1
                while pages < most and page + pages < past and is_unsaved(b, page + pages):
                    pages += 1
                slab = _slab_for(core, pages << b.shift, False)
                if slab == NULL:            # given up while waiting for room
                    return
                capture_range(core, i, page, pages, slab, True)
                page += pages
            for page in range(first, past):
                tries = 0                   # what the sweep has claimed, it copies
                while is_unsaved(b, page) and sf_load_sc(&core.phase) == ACTIVE:
                    sf_wait_briefly(tries)
                    tries += 1

cdef inline int _fault(Core *core, uint64_t address, uint64_t phase) noexcept nogil:
    """Let the write pass, saved or noted; -EAGAIN: an event must be read first."""
    cdef uint64_t began = sf_now_ns(), page, first = 0, pages = 0, tries
    cdef uint32_t i = 0
    cdef int rc = 0
    cdef Slab *slab
    cdef Block *b = block_at(core, address, &i)
    if b == NULL:
        wake(core, address & ~<uint64_t>(TARGET_PAGE - 1), TARGET_PAGE)
        return 0
    page = (address - b.hva) >> b.shift
    if phase == ARMED:
        note_window(core, b, page, &first, &pages)
        rc = let_pass(core, b, first, pages)
        if rc != -EAGAIN:
            core.count.armed_faults += 1
        return rc
    if phase == RELEASE:
        return unprotect(core, b, page, 1, True)
    if has(b.done, page):
        rc = let_pass(core, b, page, _done_ahead(core, b, page))
    else:
        _window(core, b, page, &first, &pages)
        slab = _slab_for(core, pages << b.shift, True)
        if slab == NULL:                    # given up while waiting for room
            return unprotect(core, b, page, 1, True)
        # Room may have taken long to come; the page counts from here again only as
        # a fault time, the wait is in stall_ns.
        core.blocked = False
        core.count.pages_faulted += capture_range(core, i, first, pages, slab, True) << (b.shift - TARGET_SHIFT)
        # Lost the claim: the winner's copy comes first, then we un-protect.
        tries = 0
        while not has(b.done, page):
            sf_wait_briefly(tries)
            tries += 1
        if core.blocked or not has(b.faulted, page):
            rc = let_pass(core, b, page, 1)
    _count_time(core, sf_now_ns() - began)
    return rc

cdef inline void _count_time(Core *core, uint64_t ns) noexcept nogil:
    cdef int exponent = sf_log2(ns)
    cdef uint64_t bucket = ns
    if exponent >= 3:
        bucket = min(<uint64_t>(BUCKETS - 1), ((exponent - 2) << 3) + ((ns >> (exponent - 3)) & 7))
    core.count.faults += 1
    core.count.fault_max_ns = max(core.count.fault_max_ns, ns)
    core.count.buckets[bucket] += 1

cdef inline uint64_t _done_ahead(Core *core, Block *b, uint64_t page) noexcept nogil:
    """How many pages from this one on a write to it un-protects; all are saved."""
    cdef uint64_t pages = 1, most = pages_ahead(b, page) if core.staying else 1
    while pages < most and has(b.done, page + pages):
        pages += 1
    return pages

cdef inline void _window(Core *core, Block *b, uint64_t page, uint64_t *first, uint64_t *pages) noexcept nogil:
    """As many pages as were lately captured in one run next to this one, rounded up to a
    power of two: a guest that writes in order gets large windows, others one page."""
    cdef uint64_t most = max(<uint64_t>1, core.max_window_bytes >> b.shift)
    cdef uint64_t behind = 0, ahead = 0, width = 1
    while behind < most and behind < page and has(b.faulted, page - behind - 1):
        behind += 1
    if behind == 0:
        while ahead < most and page + ahead + 1 < b.pages and has(b.faulted, page + ahead + 1):
            ahead += 1
    while width < most and width <= max(behind, ahead):
        width <<= 1
    if ahead > behind:
        first[0] = page + 1 - min(width, page + 1)
        pages[0] = page + 1 - first[0]
    else:
        first[0] = page
        pages[0] = min(width, b.pages - page)

cdef inline Slab *_slab_for(Core *core, uint64_t length, bint read_events) noexcept nogil:
    """The slab that takes ``length`` more bytes; waits while the spill is full.

    NULL when the job was given up meanwhile."""
    cdef Spill *spill = &core.spill
    cdef Slab *slab = current_slab(spill, length)
    cdef uint64_t began
    cdef int64_t index
    cdef uint32_t seen
    if slab != NULL:
        return slab
    index = ring_take(&spill.empty)
    if index < 0:
        began = sf_now_ns()
        spill.stalls += 1
        # Sequentially consistent, as the load in give_back: else we could miss the slab
        # that is given back, and its giver miss that we wait.
        sf_store_sc(&spill.waiting, 1)
        while True:
            seen = sf_word(&spill.freed)
            index = ring_take(&spill.empty)
            if index >= 0 or sf_load_sc(&core.phase) == RELEASE:
                break
            if read_events:
                _read_harmless(core)
            sf_futex_wait(&spill.freed, seen, 10000000)
        sf_store(&spill.waiting, 0)
        spill.stall_ns += sf_now_ns() - began
        if index < 0:
            return NULL
    return begin_slab(spill, index)

cdef inline void _read_harmless(Core *core) noexcept nogil:
    """While there is no room to save anything: let go on whoever drops what needs no saving."""
    cdef sf_drop drops[MOST_DROPS]
    cdef int count = drops_begun(core, drops)
    if count != NONE_PENDING and (count == 0 or saved_already(core, drops, count)):
        pump(core)
