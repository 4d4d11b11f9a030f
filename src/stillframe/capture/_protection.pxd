"""Protect, un-protect, wake, unregister: what depends on the kind of protection."""

from libc.stdint cimport uint64_t

from ._core cimport *
from ._sys cimport *

cdef enum:
    MOST_TRIES = 100000
    SWEEP_TRIES = 1000
    PASS = 0                    # UFFDIO_WRITEPROTECT_MODE_*
    WAIT = 1
    PASS_ASLEEP = 2             # whoever waits is woken later


cdef inline int set_protection(Core *core, Block *b, uint64_t first, uint64_t pages, int mode) noexcept nogil:
    sf_assert(first + pages <= b.pages)
    if core.by_signal:
        return sf_signal_protect(b.hva + (first << b.shift), pages << b.shift, mode == WAIT)
    return sf_writeprotect(core.uffd, b.hva + (first << b.shift), pages << b.shift, mode)

cdef inline void wake(Core *core, uint64_t hva, uint64_t length) noexcept nogil:
    if core.by_signal:
        sf_signal_wake(hva, length)
    else:
        sf_wake(core.uffd, hva, length)

cdef inline int unregister(Core *core, Block *b, uint64_t first, uint64_t pages) noexcept nogil:
    cdef int rc
    if core.by_signal:              # in pieces it is only un-protected
        return set_protection(core, b, first, pages, PASS)
    rc = sf_unregister(core.uffd, b.hva + (first << b.shift), pages << b.shift)
    # The kernel un-protects here but wakes nobody, and the fault thread may have ended.
    wake(core, b.hva + (first << b.shift), pages << b.shift)
    return rc

cdef inline int protect(Core *core, Block *b, uint64_t first, uint64_t pages) noexcept nogil:
    """Not for the fault thread, which reads the event that is in the way; 0 or -errno."""
    cdef int rc, tries = 0
    while True:
        rc = set_protection(core, b, first, pages, WAIT)
        if rc != -EAGAIN or tries == MOST_TRIES:
            return rc
        tries += 1
        sched_yield()

cdef inline int unprotect(Core *core, Block *b, uint64_t first, uint64_t pages, bint by_fault) noexcept nogil:
    """Let writes pass; 0 or -errno. -EAGAIN: an event is in the way, which the fault thread has
    to read first. The sweep need not wait for that: its pages are done, and the next write to
    one comes as a fault. Nor does it wake anybody: a fault that was told of stays in the kernel's
    queue until the fault thread has read it (see _read_messages)."""
    cdef int rc, tries = 0
    if core.uffd < 0:
        return 0                    # the guest stands still, nothing is protected
    while True:
        rc = set_protection(core, b, first, pages, PASS if by_fault else PASS_ASLEEP)
        if rc != -EAGAIN or by_fault or tries == SWEEP_TRIES:
            break
        tries += 1
        sched_yield()
    if rc == -ENOENT:
        wake(core, b.hva + (first << b.shift), pages << b.shift)
    elif rc < 0 and rc != -EAGAIN:
        fail(core, rc)
    return rc
