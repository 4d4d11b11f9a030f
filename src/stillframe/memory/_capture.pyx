# cython: language_level=3, boundscheck=False, wraparound=False, cdivision=True, initializedcheck=False
# cython: freethreading_compatible=True
"""The capture core: what must run without the GIL (DESIGN section 7).

One fault thread runs ``fault_loop``; any number of workers run ``Worker.next``. Both
capture pages through the same ``_capture_range``: claim, copy, mark done, un-protect,
in this order, so a page that can be written again has been copied before (invariant 2).
The fault thread allocates nothing, takes no lock and talks to nobody (invariant 3).

Reading an event (RAM dropped, unmapped) lets it happen: the kernel holds the dropping thread
until then. So events are handled within ``_pump``, before the fault thread does anything
else, and a worker marks its pages done only when no ``_pump`` is under way: a page that was
dropped before its copy was complete is never taken for done.
The Python twin with the same semantics is ``capture_oracle``.
Source of the kernel's side: Documentation/admin-guide/mm/userfaultfd.rst.
"""

from cpython.bytes cimport PyBytes_FromStringAndSize
from libc.stdint cimport int32_t, int64_t, uint8_t, uint32_t, uint64_t
from libc.stdlib cimport calloc, free, realloc
from libc.string cimport memcpy

cdef extern from "<poll.h>" nogil:
    struct pollfd:
        int fd
        short events
        short revents
    int poll(pollfd *fds, unsigned long n, int timeout)
    short POLLIN, POLLERR, POLLHUP, POLLNVAL

cdef extern from "<errno.h>" nogil:
    int errno
    int EAGAIN, EINTR, EFAULT, ENOMEM, ENOENT, EIO, ESRCH

cdef extern from "<unistd.h>" nogil:
    ssize_t read(int fd, void *buf, size_t count)

cdef extern from "<sys/mman.h>" nogil:
    int munmap(void *p, size_t length)

cdef extern from "<sched.h>" nogil:
    int sched_yield()

cdef extern from "<pthread.h>" nogil:
    ctypedef struct pthread_mutex_t:
        pass
    int pthread_mutex_init(pthread_mutex_t *m, void *attr)
    int pthread_mutex_lock(pthread_mutex_t *m)
    int pthread_mutex_unlock(pthread_mutex_t *m)
    int pthread_mutex_destroy(pthread_mutex_t *m)

cdef extern from "_capture_sys.h" nogil:
    struct sf_uffd_msg:
        uint8_t event
        uint64_t arg0, arg1, arg2
    uint64_t sf_now_ns()
    uint64_t sf_load(const uint64_t *p)
    void sf_store(uint64_t *p, uint64_t v)
    uint64_t sf_fetch_or(uint64_t *p, uint64_t v)
    uint64_t sf_fetch_add(uint64_t *p, uint64_t v)
    uint64_t sf_exchange(uint64_t *p, uint64_t v)
    uint64_t sf_load_sc(const uint64_t *p)
    void sf_store_sc(uint64_t *p, uint64_t v)
    int sf_ctz(uint64_t v)
    int sf_popcount(uint64_t v)
    int sf_log2(uint64_t v)
    int sf_writeprotect(int uffd, uint64_t hva, uint64_t length, int on)
    int sf_wake(int uffd, uint64_t hva, uint64_t length)
    int sf_unregister(int uffd, uint64_t hva, uint64_t length)
    int64_t sf_read_process(int pid, void *to, uint64_t hva, uint64_t length)
    int64_t sf_pread(int fd, void *to, uint64_t length, uint64_t offset)
    void sf_futex_wait(uint32_t *word, uint32_t expected, long timeout_ns)
    void sf_futex_wake(uint32_t *word)
    void sf_bump(uint32_t *word)
    uint32_t sf_word(const uint32_t *word)
    void sf_wait_briefly(uint64_t tries)
    int64_t sf_pages_there(int fd, uint64_t offset, uint64_t length)
    int sf_has_hole(int fd, uint64_t offset, uint64_t length)
    int sf_is_zero(const uint8_t *page, uint64_t length)
    void sf_put_be64(uint8_t *p, uint64_t v)
    void sf_put_be32(uint8_t *p, uint32_t v)
    void *sf_map_populated(uint64_t length)

cdef extern from "_signal_faults.h" nogil:
    int sf_signal_protect(uint64_t hva, uint64_t length, int on)
    void sf_signal_wake(uint64_t hva, uint64_t length)
    int sf_signal_register(uint64_t hva, uint64_t length, int fd)
    int sf_signal_release(int fd)
    int sf_signal_prepare_thread()

cdef enum:
    ARMED = 0
    HOLD = 1
    ACTIVE = 2
    RELEASE = 3
    GONE_REMOVED = 1
    GONE_UNMAPPED = 2
    GONE_HOLE = 3
    KIND_ZERO = 0
    KIND_DATA = 1
    TARGET_PAGE = 4096
    MAX_RUNS = 1024
    MAX_ABSENT = 65536      # never-populated pages that one batch may describe
    ARMED_WINDOW = 16       # pages; more would have to be protected again in the downtime
    MESSAGES = 1024
    SWEEP_TRIES = 1000
    BUCKETS = 512           # fault times: 8 linear steps per power of two of nanoseconds
    LOW_SLABS = 24          # with fewer vacant, the spill thread maps more
    EVENT_PAGEFAULT = 0x12
    EVENT_REMAP = 0x14
    EVENT_REMOVE = 0x15
    EVENT_UNMAP = 0x16

cdef struct Block:
    uint64_t hva
    uint64_t pages
    uint64_t unit           # pages that the sweep claims at once
    uint64_t units
    uint64_t target_pages   # what goes into the stream; a last huge page may be longer
    uint64_t read_offset
    int read_fd             # -1: process_vm_readv
    int check_holes
    int shift
    int idlen
    uint8_t idstr[256]
    uint64_t *claim
    uint64_t *done
    uint64_t *noted
    uint64_t *faulted
    uint64_t *populated
    uint64_t *fresh         # noted while not populated: to be looked at once protected
    uint64_t *removed       # dropped while armed: the protection may be gone with the page

cdef struct Run:
    uint64_t first_page
    uint64_t data_offset
    uint32_t block
    uint32_t pages
    uint32_t kind

cdef struct Slab:
    uint64_t used
    uint64_t absent
    uint32_t runs
    uint8_t *data
    Run run[MAX_RUNS]

cdef struct Taken:          # runs of pages, for whoever tracks writes
    uint32_t block
    uint64_t first_page
    uint64_t pages

cdef struct TakenRuns:
    Taken *run              # NULL: nobody wants them
    uint64_t count, size

cdef int taken_add(TakenRuns *runs, uint32_t block, uint64_t page) noexcept nogil:
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

cdef struct PackedRun:      # little-endian, as store/index reads it
    uint32_t block
    uint32_t pages
    uint64_t first_page
    uint32_t kind
    uint32_t raw_offset

cdef struct Ring:
    uint64_t head           # next to take
    uint64_t tail           # next to put
    uint64_t mask
    uint32_t *slot

cdef int ring_init(Ring *ring, uint64_t least) except -1:
    cdef uint64_t size = 1
    while size < least + 1:
        size <<= 1
    ring.head = ring.tail = 0
    ring.mask = size - 1
    ring.slot = <uint32_t *>calloc(size, sizeof(uint32_t))
    if ring.slot == NULL:
        raise MemoryError()
    return 0

cdef inline void ring_put(Ring *ring, uint32_t value) noexcept nogil:
    ring.slot[ring.tail & ring.mask] = value
    # Release: the taker that sees the new tail sees the slot and the slab behind it.
    sf_store(&ring.tail, ring.tail + 1)

cdef inline int64_t ring_take(Ring *ring) noexcept nogil:
    cdef uint32_t value
    if sf_load(&ring.tail) == ring.head:
        return -1
    value = ring.slot[ring.head & ring.mask]
    sf_store(&ring.head, ring.head + 1)
    return value

cdef inline uint64_t ring_count(Ring *ring) noexcept nogil:
    # Head first: what is taken and put in between only makes the count too large.
    cdef uint64_t head = sf_load(&ring.head)
    return sf_load(&ring.tail) - head


PHASE_ARMED = ARMED         # a write only un-protects and is noted
PHASE_HOLD = HOLD           # faults wait in the kernel's queue (microseconds, between stop and cont)
PHASE_ACTIVE = ACTIVE       # claim, copy, un-protect
PHASE_RELEASE = RELEASE     # un-protect without a copy: the job is being given up

LOST_REMOVED = GONE_REMOVED     # dropped by madvise (balloon, free page reporting)
LOST_UNMAPPED = GONE_UNMAPPED   # the block was unmapped or moved
LOST_HOLE = GONE_HOLE           # punched out of the file behind shared memory


def pages_there(int fd, uint64_t offset_bytes, uint64_t length_bytes):
    """How many pages of a range of a shmem file are there, swapped out or not; or -errno."""
    cdef int64_t pages
    with nogil:
        pages = sf_pages_there(fd, offset_bytes, length_bytes)
    return pages


# Protection by mprotect and a SIGSEGV handler, where there is no userfaultfd: see _signal_faults.h.

def signal_register(uint64_t hva, uint64_t length_bytes, int message_fd):
    """Tell faults in a range of our own memory to ``message_fd``; 0 or -errno."""
    cdef int rc
    with nogil:
        rc = sf_signal_register(hva, length_bytes, message_fd)
    return rc

def signal_release(int message_fd):
    """Un-protect and forget the ranges of ``message_fd``, which nobody uses then; 0 or -errno."""
    cdef int rc
    with nogil:
        rc = sf_signal_release(message_fd)
    return rc

def signal_prepare_thread():
    """Give this thread an alternate stack for faults, and let SIGSEGV in; 0 or -errno."""
    return sf_signal_prepare_thread()


cdef class Capture:
    """State of one capture of a process's RAM. See ``_capture.pyi``."""

    cdef int uffd, stop_fd, pid
    cdef bint by_signal     # uffd is the pipe of the SIGSEGV handler
    cdef bint finely        # while armed, only what is written is to be noted
    cdef Block *blocks
    cdef uint32_t block_count
    cdef uint64_t phase, cursor, units_total
    cdef uint64_t serving, reading  # odd while a fault is served, while messages are read
    cdef uint64_t slab_bytes, max_window_bytes
    cdef Slab *slabs
    cdef uint32_t slab_limit
    cdef uint64_t slabs_grown, drain_above
    cdef int64_t current
    cdef Ring full, empty
    cdef pthread_mutex_t worker_lock
    cdef uint32_t freed             # futex word: bumped when a slab becomes free
    cdef uint32_t low               # futex word: bumped when vacant slabs become few
    cdef uint64_t waiting, spill_ended
    cdef uint32_t section_id
    cdef uint64_t faults, armed_faults, fault_max_ns, stall_ns, stalls, spill_peak
    cdef uint64_t pages_done, pages_faulted, pages_zero, pages_data, pages_absent
    cdef uint64_t buckets[BUCKETS]
    cdef int64_t error
    cdef uint64_t lost_taken, lost_kind, lost_hva, lost_length
    cdef sf_uffd_msg queue[MESSAGES]
    cdef uint32_t queue_head, queue_tail

    def __cinit__(self, int uffd, int stop_fd, int pid, blocks, *, uint64_t slab_bytes,
                  uint32_t spill_slabs, uint64_t max_window_bytes, bint by_signal=False):
        cdef uint32_t i
        cdef uint64_t words
        cdef Block *b
        cdef bytes idstr
        self.uffd = uffd
        self.stop_fd = stop_fd
        self.pid = pid
        self.by_signal = by_signal
        self.finely = False
        self.slab_bytes = slab_bytes
        self.max_window_bytes = min(max_window_bytes, slab_bytes)
        self.current = -1
        self.block_count = len(blocks)
        pthread_mutex_init(&self.worker_lock, NULL)
        self.blocks = <Block *>calloc(self.block_count + 1, sizeof(Block))
        self.slabs = <Slab *>calloc(spill_slabs, sizeof(Slab))
        if self.blocks == NULL or self.slabs == NULL:
            raise MemoryError()
        self.slab_limit = spill_slabs
        self.drain_above = min(spill_slabs // 4, 32)
        ring_init(&self.full, spill_slabs)
        ring_init(&self.empty, spill_slabs)
        for i in range(self.block_count):
            hva, pages, target_pages, page_bytes, read_fd, read_offset, check_holes, idstr = blocks[i]
            if page_bytes & (page_bytes - 1) or page_bytes < TARGET_PAGE or page_bytes > slab_bytes:
                raise ValueError(f"page size {page_bytes} of block {i}")
            if len(idstr) > 255:
                raise ValueError(f"name of block {i} is longer than 255 bytes")
            b = &self.blocks[i]
            b.hva = hva
            b.pages = pages
            b.target_pages = target_pages
            b.shift = sf_log2(page_bytes)
            b.read_fd = read_fd
            b.read_offset = read_offset
            b.check_holes = check_holes
            b.idlen = len(idstr)
            memcpy(b.idstr, <const char *>idstr, b.idlen)
            b.unit = min(64, slab_bytes >> b.shift)
            b.units = (b.pages + b.unit - 1) // b.unit
            self.units_total += b.units
            words = (b.pages + 63) // 64 + 1
            b.claim = <uint64_t *>calloc(words * 7, sizeof(uint64_t))
            if b.claim == NULL:
                raise MemoryError()
            b.done = b.claim + words
            b.noted = b.done + words
            b.faulted = b.noted + words
            b.populated = b.faulted + words
            b.fresh = b.populated + words
            b.removed = b.fresh + words

    def __dealloc__(self):
        cdef uint32_t i
        if self.blocks != NULL:
            for i in range(self.block_count):
                free(self.blocks[i].claim)
            free(self.blocks)
        if self.slabs != NULL:
            for i in range(self.slab_limit):
                if self.slabs[i].data != NULL:
                    munmap(self.slabs[i].data, self.slab_bytes)
            free(self.slabs)
        free(self.full.slot)
        free(self.empty.slot)
        pthread_mutex_destroy(&self.worker_lock)

    # --- setup ----------------------------------------------------------------

    def set_section_id(self, uint32_t section_id):
        self.section_id = section_id

    cdef int _check_range(self, uint32_t block, uint64_t first_page, uint64_t pages) except -1:
        if block >= self.block_count:
            raise ValueError("no such block")
        if pages > self.blocks[block].pages or first_page > self.blocks[block].pages - pages:
            raise ValueError("pages outside the block")
        return 0

    def mark_populated(self, uint32_t block, uint64_t first_page, uint64_t pages):
        cdef uint64_t page
        self._check_range(block, first_page, pages)
        with nogil:
            page = first_page
            while page < first_page + pages:
                if page & 63 == 0 and page + 64 <= first_page + pages:
                    self.blocks[block].populated[page >> 6] = ~<uint64_t>0
                    page += 64
                else:
                    self.blocks[block].populated[page >> 6] |= (<uint64_t>1) << (page & 63)
                    page += 1

    def mark_populated_from_pagemap(self, uint32_t block, const uint64_t[::1] entries, uint64_t first_page):
        """Entries of /proc/PID/pagemap, one per 4 KiB (Documentation/admin-guide/mm/pagemap.rst)."""
        cdef uint64_t i, page, entry
        cdef uint64_t n = entries.shape[0]
        cdef int step = 0
        self._check_range(block, first_page, 0)
        step = self.blocks[block].shift - 12
        self._check_range(block, first_page, (n + (1 << step) - 1) >> step)
        with nogil:
            for i in range(n):
                entry = entries[i]
                # Present, or in swap, or just being migrated. Our own protection of an
                # empty page shows as protected (bit 57) and swap type 31 (SWP_PTE_MARKER)
                # where types are shown; the marker of a poisoned page is not protected.
                if entry >> 63 or ((entry >> 62) & 1 and (entry & 31 != 31 or not (entry >> 57) & 1)):
                    page = first_page + (i >> step)
                    self.blocks[block].populated[page >> 6] |= (<uint64_t>1) << (page & 63)

    def grow_spill(self, uint32_t slabs):
        """Map so many slabs now. By one thread at a time: before, or as, ``spill_loop``."""
        with nogil:
            while slabs and self._grow():
                slabs -= 1
        return self.slabs_grown

    cdef bint _grow(self) noexcept nogil:
        cdef uint8_t *data
        if self.slabs_grown >= self.slab_limit:
            return False
        data = <uint8_t *>sf_map_populated(self.slab_bytes)
        if data == NULL:
            self.slab_limit = <uint32_t>self.slabs_grown    # no memory: the spill ends here
            return False
        self.slabs[self.slabs_grown].data = data
        # Counted before it can be taken, so the used ones never come out negative.
        sf_store(&self.slabs_grown, self.slabs_grown + 1)
        self._give_back(<uint32_t>self.slabs_grown - 1)
        return True

    def spill_loop(self):
        """Map slabs ahead of need, up to the limit, until ``end_spill``; in a thread of its own:
        the fault thread allocates nothing, and the workers may be busy for milliseconds."""
        cdef uint32_t seen
        with nogil:
            while not sf_load(&self.spill_ended):
                seen = sf_word(&self.low)
                if ring_count(&self.empty) < LOW_SLABS:
                    if not self._grow():
                        break
                else:
                    sf_futex_wait(&self.low, seen, 100000000)

    def end_spill(self):
        sf_store(&self.spill_ended, 1)
        sf_bump(&self.low)
        sf_futex_wake(&self.low)

    cdef uint64_t _slabs_used(self) noexcept nogil:
        cdef uint64_t vacant = ring_count(&self.empty)
        cdef uint64_t grown = sf_load(&self.slabs_grown)
        return grown - min(vacant, grown)

    # --- protection -----------------------------------------------------------

    # What depends on the kind of protection is in these three.

    cdef int _set_protection(self, Block *b, uint64_t first, uint64_t pages, int on) noexcept nogil:
        """Un-protecting wakes who waits, with either kind."""
        if self.by_signal:
            return sf_signal_protect(b.hva + (first << b.shift), pages << b.shift, on)
        return sf_writeprotect(self.uffd, b.hva + (first << b.shift), pages << b.shift, on)

    cdef void _wake(self, uint64_t hva, uint64_t length) noexcept nogil:
        if self.by_signal:
            sf_signal_wake(hva, length)
        else:
            sf_wake(self.uffd, hva, length)

    cdef int _unregister(self, Block *b, uint64_t first, uint64_t pages) noexcept nogil:
        cdef int rc
        if self.by_signal:              # in pieces it is only un-protected
            return self._set_protection(b, first, pages, 0)
        rc = sf_unregister(self.uffd, b.hva + (first << b.shift), pages << b.shift)
        # The kernel un-protects here but wakes nobody, and the fault thread may have ended.
        self._wake(b.hva + (first << b.shift), pages << b.shift)
        return rc

    cdef int _protect(self, Block *b, uint64_t first, uint64_t pages, int on) noexcept nogil:
        cdef int rc, tries = 0
        while True:
            rc = self._set_protection(b, first, pages, on)
            if rc == -EAGAIN and tries < 100000:
                tries += 1              # an event is being read by the fault thread
                sched_yield()
                continue
            return rc

    def protect(self, uint32_t block, uint64_t first_page, uint64_t pages):
        cdef int rc
        self._check_range(block, first_page, pages)
        with nogil:
            rc = self._protect(&self.blocks[block], first_page, pages, 1)
        return rc

    def unregister(self, uint32_t block, uint64_t first_page, uint64_t pages):
        cdef int rc
        self._check_range(block, first_page, pages)
        with nogil:
            rc = self._unregister(&self.blocks[block], first_page, pages)
        return rc

    def protect_noted(self):
        """Protect again what was written since; returns the pages, or -errno."""
        cdef TakenRuns nobody
        cdef int64_t result
        nobody.run = NULL
        with nogil:
            result = self._protect_noted(&nobody)
        return result

    def track_finely(self):
        """Note few pages more than are written, at the price of more faults; before any write."""
        self.finely = True

    def take_noted(self):
        """As ``protect_noted``; returns the runs (block, first page, pages), or -errno."""
        cdef TakenRuns runs
        cdef int64_t result
        cdef uint64_t i
        runs.count = 0
        runs.size = MAX_RUNS
        runs.run = <Taken *>calloc(runs.size, sizeof(Taken))
        if runs.run == NULL:
            raise MemoryError()
        try:
            with nogil:
                result = self._protect_noted(&runs)
            if result < 0:
                return result
            return [(runs.run[i].block, runs.run[i].first_page, runs.run[i].pages)
                    for i in range(runs.count)]
        finally:
            free(runs.run)

    cdef int64_t _protect_noted(self, TakenRuns *taken) noexcept nogil:
        cdef int64_t total = 0
        cdef int rc
        cdef uint32_t i
        self._await(&self.serving)          # a fault of before the stop is of before the stop
        for i in range(self.block_count):
            rc = self._protect_noted_block(i, &total, taken)
            if rc < 0:
                return rc
        return total

    cdef int _protect_noted_block(self, uint32_t block, int64_t *total, TakenRuns *taken) noexcept nogil:
        # Runs are joined over gaps of up to 32 pages: protecting a protected page again
        # costs less than one more system call with its TLB flush.
        cdef Block *b = &self.blocks[block]
        cdef uint64_t word, bits, page, start = 0, end = 0
        cdef int rc
        for word in range((b.pages + 63) >> 6):
            if (sf_load(&b.noted[word]) | sf_load(&b.removed[word])) == 0:
                continue
            # Taken before it is protected: a write after the ioctl faults and notes anew.
            bits = sf_exchange(&b.noted[word], 0)
            total[0] += sf_popcount(bits)
            # Dropped pages stay in `removed`: the drop itself may come after this pass.
            bits |= sf_load(&b.removed[word])
            if b.check_holes:
                b.fresh[word] |= (bits & ~b.populated[word]) | sf_load(&b.removed[word])
            else:
                b.populated[word] |= bits
            while bits:
                page = (word << 6) + sf_ctz(bits)
                bits &= bits - 1
                if taken.run != NULL:
                    rc = taken_add(taken, block, page)
                    if rc < 0:
                        return rc
                if end and page <= end + 32:
                    end = page + 1
                    continue
                if end:
                    rc = self._protect(b, start, end - start, 1)
                    if rc < 0:
                        return rc
                start = page
                end = page + 1
        if end:
            rc = self._protect(b, start, end - start, 1)
            if rc < 0:
                return rc
        if b.check_holes:
            self._look_at_fresh(b)
        return 0

    cdef void _look_at_fresh(self, Block *b) noexcept nogil:
        """Un-protected is not yet written: a page that is still a hole, protected again, has
        never been populated, and its hole must not count as RAM that was dropped."""
        cdef uint64_t word, bits, page
        for word in range((b.pages + 63) >> 6):
            bits = b.fresh[word]
            b.fresh[word] = 0
            while bits:
                page = (word << 6) + sf_ctz(bits)
                if sf_has_hole(b.read_fd, b.read_offset + (page << b.shift), (<uint64_t>1) << b.shift):
                    b.populated[word] &= ~(bits & (~bits + 1))
                else:
                    b.populated[word] |= bits & (~bits + 1)
                bits &= bits - 1

    def noted_runs(self, uint32_t most=4096):
        """Runs (block, first page, pages) noted and not yet protected again."""
        cdef uint32_t i
        cdef uint64_t word, bits, page, start, end
        found = []
        for i in range(self.block_count):
            start = end = 0
            for word in range((self.blocks[i].pages + 63) >> 6):
                bits = sf_load(&self.blocks[i].noted[word])
                while bits:
                    page = (word << 6) + sf_ctz(bits)
                    bits &= bits - 1
                    if page != end:
                        if end > start and <uint32_t>len(found) < most:
                            found.append((i, start, end - start))
                        start = page
                    end = page + 1
            if end > start and <uint32_t>len(found) < most:
                found.append((i, start, end - start))
        return found

    def set_phase(self, uint64_t phase):
        """Switch the phase and wait until no fault is handled under the old one."""
        with nogil:
            sf_store_sc(&self.phase, phase)
            sf_futex_wake(&self.freed)
            self._await(&self.serving)
            self._await(&self.reading)

    def await_fault(self):
        """Wait until the fault that is being served now, if any, has been served."""
        with nogil:
            self._await(&self.serving)

    cdef void _await(self, const uint64_t *sequence) noexcept nogil:
        cdef uint64_t seen = sf_load_sc(sequence)
        while seen & 1 and sf_load_sc(sequence) == seen:
            sched_yield()

    # --- capture: shared by the fault thread and the sweep ------------------------

    cdef void _fail(self, int64_t error) noexcept nogil:
        if self.error == 0:
            self.error = error

    cdef void _lost(self, uint64_t kind, uint64_t hva, uint64_t length) noexcept nogil:
        if sf_exchange(&self.lost_taken, 1) == 0:
            self.lost_hva = hva
            self.lost_length = length
            sf_store(&self.lost_kind, kind)

    cdef int _copy(self, Block *b, uint64_t first, uint64_t pages, uint8_t *to) noexcept nogil:
        cdef uint64_t length = pages << b.shift
        cdef uint64_t offset = first << b.shift
        cdef uint64_t got = 0
        cdef int64_t n
        while got < length:
            if b.read_fd >= 0:
                n = sf_pread(b.read_fd, to + got, length - got, b.read_offset + offset + got)
            else:
                n = sf_read_process(self.pid, to + got, b.hva + offset + got, length - got)
            if n == -EINTR:
                continue
            if n == -EFAULT or (n == 0 and b.read_fd >= 0):
                # Nothing is mapped there any more, or its file was cut off.
                self._lost(GONE_UNMAPPED if n else GONE_HOLE, b.hva + offset + got, length - got)
                return 0
            if n <= 0:
                return <int>n if n < 0 else -EIO
            got += n
        if b.check_holes:
            # These pages were populated at the instant; a hole means that they were
            # punched out before the copy, so zeros would be silently wrong.
            if sf_has_hole(b.read_fd, b.read_offset + offset, length):
                self._lost(GONE_HOLE, b.hva + offset, length)
        return 0

    cdef void _append(self, Slab *slab, uint32_t block, uint64_t first, uint64_t pages, int kind) noexcept nogil:
        cdef Block *b = &self.blocks[block]
        cdef Run *last
        cdef uint64_t at = slab.used
        cdef int rc
        if kind == KIND_DATA:
            rc = self._copy(b, first, pages, slab.data + at)
            if rc < 0:
                self._fail(rc)
            slab.used += pages << b.shift
        else:
            slab.absent += pages << (b.shift - 12)
        if slab.runs:
            last = &slab.run[slab.runs - 1]
            if (last.block == block and last.kind == <uint32_t>kind
                    and last.first_page + last.pages == first):
                last.pages += pages
                return
        last = &slab.run[slab.runs]
        last.block = block
        last.kind = kind
        last.first_page = first
        last.pages = pages
        last.data_offset = at
        slab.runs += 1

    cdef int _unprotect(self, Block *b, uint64_t first, uint64_t pages, bint by_fault) noexcept nogil:
        cdef int rc, tries = 0
        if self.uffd < 0:
            return 0                    # the guest stands still, nothing is protected
        while True:
            rc = self._set_protection(b, first, pages, 0)
            if rc != -EAGAIN:
                break
            # An event is in the way, which only the fault thread reads. The sweep need not
            # wait for that: its pages are done, and the next write to one comes as a fault.
            tries += 1
            if tries == (100000 if by_fault else SWEEP_TRIES):
                break
            if by_fault:
                self._pump()
                sf_wait_briefly(tries)
            else:
                sched_yield()
        if rc == -ENOENT:
            self._wake(b.hva + (first << b.shift), pages << b.shift)
        elif rc < 0 and (by_fault or rc != -EAGAIN):
            self._fail(rc)
        return rc

    cdef void _release_captured(self, Block *b, uint64_t first, uint64_t pages, bint by_fault) noexcept nogil:
        # Not registered any more: something else was mapped over it, so what was copied may
        # be of that. (When we give up we unregister it ourselves.)
        if self._unprotect(b, first, pages, by_fault) == -ENOENT and sf_load_sc(&self.phase) == ACTIVE:
            self._lost(GONE_UNMAPPED, b.hva + (first << b.shift), pages << b.shift)

    cdef uint64_t _capture_range(self, uint32_t block, uint64_t first, uint64_t pages,
                                 Slab *slab, bint by_fault) noexcept nogil:
        """Claim, copy, mark done, un-protect; returns how many pages were won."""
        cdef Block *b = &self.blocks[block]
        cdef uint64_t page = first, end = first + pages
        cdef uint64_t word, mask, won, there, at, run, total = 0
        cdef uint64_t open_start = 0, open_end = 0
        cdef int low, kind
        while page < end:
            word = page >> 6
            low = page & 63
            mask = ~<uint64_t>0 << low
            if end - (word << 6) < 64:
                mask &= ((<uint64_t>1) << (end - (word << 6))) - 1
            page = (word + 1) << 6
            # The claim: whoever turns the bit from 0 to 1 copies the page, nobody else.
            won = mask & ~sf_fetch_or(&b.claim[word], mask)
            mask = won
            while mask:
                at = sf_ctz(mask)
                kind = KIND_DATA if (b.populated[word] >> at) & 1 else KIND_ZERO
                run = 1
                there = b.populated[word] if kind == KIND_DATA else ~b.populated[word]
                while at + run < 64 and (mask >> (at + run)) & 1 and (there >> (at + run)) & 1:
                    run += 1
                self._append(slab, block, (word << 6) + at, run, kind)
                if at + run == 64:
                    mask = 0
                else:
                    mask &= ~<uint64_t>0 << (at + run)
            if won == 0:
                continue
            total += sf_popcount(won)
            if by_fault:
                sf_fetch_or(&b.faulted[word], won)
            else:
                self._await(&self.reading)      # see the top of this file
            # Release: a loser that sees `done` may un-protect; the copy is complete.
            sf_fetch_or(&b.done[word], won)
            mask = won
            while mask:
                at = sf_ctz(mask)
                run = 1
                while at + run < 64 and (mask >> (at + run)) & 1:
                    run += 1
                if open_end and open_end == (word << 6) + at:
                    open_end += run
                else:
                    if open_end:
                        self._release_captured(b, open_start, open_end - open_start, by_fault)
                    open_start = (word << 6) + at
                    open_end = open_start + run
                if at + run == 64:
                    mask = 0
                else:
                    mask &= ~<uint64_t>0 << (at + run)
        if open_end:
            self._release_captured(b, open_start, open_end - open_start, by_fault)
        sf_fetch_add(&self.pages_done, total << (b.shift - 12))
        return total

    # --- the fault thread -----------------------------------------------------

    def fault_loop(self):
        """Serve faults until ``stop_fd`` becomes readable; returns 0 or -errno."""
        cdef int rc
        with nogil:
            rc = self._fault_loop()
        return rc

    cdef int _pump(self) noexcept nogil:
        """Read what there is: faults are queued, events are handled at once."""
        cdef int64_t n
        cdef uint32_t i, count
        cdef int rc = 0
        cdef uint64_t phase
        cdef sf_uffd_msg *msg
        if self.queue_head:
            for i in range(self.queue_head, self.queue_tail):
                self.queue[i - self.queue_head] = self.queue[i]
            self.queue_tail -= self.queue_head
            self.queue_head = 0
        if self.queue_tail == MESSAGES:
            return 0
        # reading before phase, both sequentially consistent: see set_phase.
        sf_store_sc(&self.reading, self.reading + 1)
        phase = sf_load_sc(&self.phase)
        n = read(self.uffd, &self.queue[self.queue_tail], (MESSAGES - self.queue_tail) * sizeof(sf_uffd_msg))
        if n < 0:
            rc = 0 if errno == EAGAIN or errno == EINTR else -errno
            n = 0
        count = <uint32_t>(n // <int64_t>sizeof(sf_uffd_msg))
        msg = &self.queue[self.queue_tail]
        for i in range(count):
            if msg[i].event == EVENT_PAGEFAULT:
                self.queue[self.queue_tail] = msg[i]
                self.queue_tail += 1
            elif msg[i].event == EVENT_REMOVE:
                self._range_gone(phase, GONE_REMOVED, msg[i].arg0, msg[i].arg1)
            elif msg[i].event == EVENT_UNMAP:
                self._range_gone(phase, GONE_UNMAPPED, msg[i].arg0, msg[i].arg1)
            elif msg[i].event == EVENT_REMAP:
                self._range_gone(phase, GONE_UNMAPPED, msg[i].arg0, msg[i].arg0 + msg[i].arg2)
        sf_store_sc(&self.reading, self.reading + 1)
        return rc

    cdef int _fault_loop(self) noexcept nogil:
        cdef pollfd fds[2]
        cdef int rc
        cdef uint64_t address
        while True:
            if self.queue_head == self.queue_tail:
                rc = self._pump()
                if rc < 0:
                    self._fail(rc)
                    return rc
            if self.queue_head == self.queue_tail:
                fds[0].fd = self.uffd
                fds[0].events = POLLIN
                fds[1].fd = self.stop_fd
                fds[1].events = POLLIN
                if poll(fds, 2, -1) < 0:
                    if errno == EINTR:
                        continue
                    rc = -errno
                    self._fail(rc)
                    return rc
                if fds[1].revents:
                    return 0
                if fds[0].revents & (POLLERR | POLLHUP | POLLNVAL) and not fds[0].revents & POLLIN:
                    self._fail(-ESRCH)
                    return -ESRCH
                continue
            address = self.queue[self.queue_head].arg1
            self.queue_head += 1
            # serving before phase, both sequentially consistent: see set_phase.
            while True:
                sf_store_sc(&self.serving, self.serving + 1)
                if sf_load_sc(&self.phase) != HOLD:
                    break
                sf_store_sc(&self.serving, self.serving + 1)
                self._pump()            # an unread event would keep us from protecting
                sf_wait_briefly(64)     # the job's thread must get on
            self._fault(address)
            sf_store_sc(&self.serving, self.serving + 1)

    cdef void _range_gone(self, uint64_t phase, uint64_t kind, uint64_t start, uint64_t end) noexcept nogil:
        """RAM is dropped or was unmapped behind us: wrong only for pages not yet copied."""
        cdef uint32_t i
        cdef uint64_t low, high, page, first, last, mask
        cdef Block *b
        if phase == RELEASE:
            return
        for i in range(self.block_count):
            b = &self.blocks[i]
            low = max(start, b.hva)
            high = min(end, b.hva + (b.pages << b.shift))
            if low >= high:
                continue
            first = (low - b.hva) >> b.shift
            last = (high - 1 - b.hva) >> b.shift
            if phase == HOLD or (phase == ARMED and kind != GONE_REMOVED):
                self._lost(kind, low, high - low)
                return
            for page in range(first, last + 1):
                mask = (<uint64_t>1) << (page & 63)
                if phase == ARMED:
                    # Before the instant the guest may give pages up; but with an anonymous
                    # page its protection goes too, so it is protected anew at the instant.
                    sf_fetch_or(&b.removed[page >> 6], mask)
                elif not sf_load(&b.done[page >> 6]) & mask and b.populated[page >> 6] & mask:
                    self._lost(kind, b.hva + (page << b.shift), high - b.hva - (page << b.shift))
                    return

    cdef void _fault(self, uint64_t address) noexcept nogil:
        cdef uint64_t began = sf_now_ns(), page, first, pages, spent, tries
        cdef uint64_t phase = sf_load_sc(&self.phase)
        cdef uint32_t i
        cdef Block *b = NULL
        cdef Slab *slab
        for i in range(self.block_count):
            b = &self.blocks[i]
            if b.hva <= address < b.hva + (b.pages << b.shift):
                break
        else:
            self._wake(address & ~<uint64_t>0xfff, 4096)
            return
        page = (address - b.hva) >> b.shift
        if phase == ARMED:
            self._note(b, page)
            return
        if phase == RELEASE:
            self._unprotect(b, page, 1, True)
            return
        if (sf_load(&b.done[page >> 6]) >> (page & 63)) & 1:
            self._unprotect(b, page, 1, True)
        else:
            self._window(b, page, &first, &pages)
            slab = self._slab_for(pages << b.shift)
            if slab == NULL:                    # given up while waiting for room
                self._unprotect(b, page, 1, True)
                return
            # Room may have taken long to come; the page counts from here again only as
            # a fault time, the wait is in stall_ns.
            self.pages_faulted += self._capture_range(i, first, pages, slab, True) << (b.shift - 12)
            # Lost the claim: the winner's copy comes first, then we un-protect.
            tries = 0
            while not (sf_load(&b.done[page >> 6]) >> (page & 63)) & 1:
                sf_wait_briefly(tries)
                tries += 1
            if not (sf_load(&b.faulted[page >> 6]) >> (page & 63)) & 1:
                self._unprotect(b, page, 1, True)
        spent = sf_now_ns() - began
        self.faults += 1
        if spent > self.fault_max_ns:
            self.fault_max_ns = spent
        self.buckets[self._bucket(spent)] += 1

    cdef uint64_t _bucket(self, uint64_t ns) noexcept nogil:
        cdef int exponent = sf_log2(ns)
        if exponent < 3:
            return ns
        return min(BUCKETS - 1, ((exponent - 2) << 3) + ((ns >> (exponent - 3)) & 7))

    cdef void _note(self, Block *b, uint64_t page) noexcept nogil:
        cdef uint64_t pages = 1
        if self.finely:
            pages = self._pages_ahead(b, page)
        elif b.shift == 12:
            page &= ~<uint64_t>(ARMED_WINDOW - 1)
            pages = min(ARMED_WINDOW, b.pages - page)
        # Noted after it is un-protected: protect_noted may take the note and protect the
        # page at any moment, and an un-protect after that would go unseen. A write in
        # between is not missed either, as set_phase waits for this function's end.
        self._unprotect(b, page, pages, True)
        sf_fetch_or(&b.noted[page >> 6], (((<uint64_t>1) << pages) - 1) << (page & 63))
        self.armed_faults += 1

    cdef uint64_t _pages_ahead(self, Block *b, uint64_t page) noexcept nogil:
        """From this page on, the next power of two of how many were noted in one run before it: a
        guest that writes in order faults seldom. Within one word of the notes."""
        cdef uint64_t behind = 0, width = 1
        while behind < ARMED_WINDOW and behind < page and (
                (sf_load(&b.noted[(page - behind - 1) >> 6]) >> ((page - behind - 1) & 63)) & 1):
            behind += 1
        while width < ARMED_WINDOW and width <= behind:
            width <<= 1
        return min(width, min(b.pages - page, 64 - (page & 63)))

    cdef void _window(self, Block *b, uint64_t page, uint64_t *first, uint64_t *pages) noexcept nogil:
        """As many pages as were lately captured in one run next to this one, rounded up to a
        power of two: a guest that writes in order gets large windows, others one page."""
        cdef uint64_t most = self.max_window_bytes >> b.shift
        cdef uint64_t behind = 0, ahead = 0, width = 1
        if most == 0:
            most = 1
        while behind < most and behind < page and (
                (sf_load(&b.faulted[(page - behind - 1) >> 6]) >> ((page - behind - 1) & 63)) & 1):
            behind += 1
        if behind == 0:
            while ahead < most and page + ahead + 1 < b.pages and (
                    (sf_load(&b.faulted[(page + ahead + 1) >> 6]) >> ((page + ahead + 1) & 63)) & 1):
                ahead += 1
        while width < most and width <= max(behind, ahead):
            width <<= 1
        if ahead > behind:
            first[0] = page + 1 - min(width, page + 1)
            pages[0] = page + 1 - first[0]
        else:
            first[0] = page
            pages[0] = min(width, b.pages - page)

    cdef Slab *_slab_for(self, uint64_t length) noexcept nogil:
        """The slab that takes ``length`` more bytes; waits while the spill is full.

        NULL when the job was given up meanwhile."""
        cdef Slab *slab
        cdef uint64_t began, used
        cdef int64_t index
        cdef uint32_t seen
        if self.current >= 0:
            slab = &self.slabs[self.current]
            if (slab.used + length <= self.slab_bytes and slab.runs + (length >> 12) + 2 <= MAX_RUNS
                    and slab.absent + (length >> 12) <= MAX_ABSENT):
                return slab
            ring_put(&self.full, <uint32_t>self.current)
            self.current = -1
        index = ring_take(&self.empty)
        if index < 0:
            began = sf_now_ns()
            self.stalls += 1
            # Sequentially consistent, as the load in _give_back: else we could miss the slab
            # that is given back, and its giver miss that we wait.
            sf_store_sc(&self.waiting, 1)
            while True:
                seen = sf_word(&self.freed)
                index = ring_take(&self.empty)
                if index >= 0 or sf_load_sc(&self.phase) == RELEASE:
                    break
                self._pump()            # who waits for an event to be read may be in our way
                sf_futex_wait(&self.freed, seen, 10000000)
            sf_store(&self.waiting, 0)
            self.stall_ns += sf_now_ns() - began
            if index < 0:
                return NULL
        if sf_load(&self.slabs_grown) < self.slab_limit and ring_count(&self.empty) < LOW_SLABS:
            sf_bump(&self.low)
            sf_futex_wake(&self.low)
        self.current = index
        slab = &self.slabs[index]
        slab.used = slab.absent = slab.runs = 0
        used = self._slabs_used()
        if used > self.spill_peak:
            self.spill_peak = used
        return slab

    def flush(self):
        """Hand the fault thread's last, partly filled slab to the workers (after it ended)."""
        if self.current >= 0:
            ring_put(&self.full, <uint32_t>self.current)
            self.current = -1

    # --- the workers' side ------------------------------------------------------

    cdef int64_t _take_full(self, bint always) noexcept nogil:
        cdef int64_t index = -1
        cdef uint64_t used
        pthread_mutex_lock(&self.worker_lock)
        used = self._slabs_used()
        if always or used > self.drain_above:
            index = ring_take(&self.full)
        pthread_mutex_unlock(&self.worker_lock)
        return index

    cdef void _give_back(self, uint32_t index) noexcept nogil:
        pthread_mutex_lock(&self.worker_lock)
        ring_put(&self.empty, index)
        pthread_mutex_unlock(&self.worker_lock)
        sf_bump(&self.freed)
        if sf_load_sc(&self.waiting):
            sf_futex_wake(&self.freed)

    cdef bint _sweep(self, Slab *slab, int64_t *pending) noexcept nogil:
        """Capture the next units in address order until the slab is full; False at the end."""
        cdef uint64_t unit, first, pages
        cdef uint32_t i
        cdef Block *b
        slab.used = slab.absent = slab.runs = 0
        while True:
            if self.slab_bytes - slab.used < self.slab_bytes // 4 and slab.used:
                return True
            if slab.absent + 64 * 512 > MAX_ABSENT or slab.runs + 66 > MAX_RUNS:
                return True
            # The cursor only spreads the work; the claim decides who copies.
            if pending[0] >= 0:
                unit = pending[0]
            else:
                unit = sf_fetch_add(&self.cursor, 1)
                if unit >= self.units_total:
                    return slab.runs > 0
            pending[0] = unit
            i = 0
            while unit >= self.blocks[i].units:
                unit -= self.blocks[i].units
                i += 1
            b = &self.blocks[i]
            first = unit * b.unit
            pages = min(b.unit, b.pages - first)
            if slab.used + (pages << b.shift) > self.slab_bytes:
                return True             # it opens this worker's next batch
            pending[0] = -1
            self._capture_range(i, first, pages, slab, False)

    cdef uint64_t _populated(self) noexcept nogil:
        """Target pages that were populated when that was looked at last."""
        cdef uint64_t pages = 0, word
        cdef uint32_t i
        cdef Block *b
        for i in range(self.block_count):
            b = &self.blocks[i]
            for word in range((b.pages + 63) >> 6):
                pages += (<uint64_t>sf_popcount(b.populated[word])) << (b.shift - 12)
        return pages

    def statistics(self):
        cdef uint64_t total = 0, seen = 0, value
        cdef uint32_t i
        quantiles = {50: 0.0, 99: 0.0}
        for i in range(BUCKETS):
            total += self.buckets[i]
        for percent in quantiles:
            seen = 0
            for i in range(BUCKETS):
                seen += self.buckets[i]
                if total and seen * 100 >= total * percent:
                    value = i if i < 8 else ((<uint64_t>(8 + (i & 7))) << ((i >> 3) - 1))
                    quantiles[percent] = value / 1000.0
                    break
        return {
            "faults": self.faults,
            "armed_faults": self.armed_faults,
            "fault_p50_us": quantiles[50],
            "fault_p99_us": quantiles[99],
            "fault_max_us": self.fault_max_ns / 1000.0,
            "stall_ms": self.stall_ns / 1e6,
            "stalls": self.stalls,
            "spill_used_bytes": self._slabs_used() * self.slab_bytes,
            "spill_peak_bytes": self.spill_peak * self.slab_bytes,
            "pages_done": self.pages_done,
            "pages_faulted": self.pages_faulted,
            "pages_zero": self.pages_zero,
            "pages_data": self.pages_data,
            "pages_never_populated": self.pages_absent,
            "pages_populated": self._populated(),
            "error": self.error,
            "lost": (self.lost_kind, self.lost_hva, self.lost_length) if self.lost_kind else None,
        }


cdef class Worker:
    """One worker's buffers: a slab of its own, the packed records, their index runs."""

    cdef Capture capture
    cdef Slab *own
    cdef uint8_t *out
    cdef PackedRun *packed
    cdef uint64_t out_bytes, out_size
    cdef uint64_t packed_count, packed_size
    cdef int64_t pending

    def __cinit__(self, Capture capture not None):
        cdef uint64_t pages = capture.slab_bytes // TARGET_PAGE
        self.capture = capture
        self.pending = -1
        self.out_size = pages * (TARGET_PAGE + 8) + MAX_ABSENT * 9 + MAX_RUNS * 257 + 64
        self.packed_size = pages + MAX_RUNS
        self.own = <Slab *>calloc(1, sizeof(Slab))
        self.packed = <PackedRun *>calloc(self.packed_size, sizeof(PackedRun))
        if self.own == NULL or self.packed == NULL:
            raise MemoryError()
        self.own.data = <uint8_t *>sf_map_populated(capture.slab_bytes)
        self.out = <uint8_t *>sf_map_populated(self.out_size)
        if self.own.data == NULL or self.out == NULL:
            raise MemoryError()

    def __dealloc__(self):
        if self.own != NULL:
            if self.own.data != NULL:
                munmap(self.own.data, self.capture.slab_bytes)
            free(self.own)
        if self.out != NULL:
            munmap(self.out, self.out_size)
        free(self.packed)

    def next(self):
        """Capture and pack the next batch; returns its bytes, 0 when there is none now."""
        cdef int64_t index
        cdef bint swept
        with nogil:
            index = self.capture._take_full(False)
            if index < 0:
                swept = self.capture._sweep(self.own, &self.pending)
                if not swept:
                    index = self.capture._take_full(True)
            self.out_bytes = self.packed_count = 0
            if index >= 0:
                self._pack(&self.capture.slabs[index])
                self.capture._give_back(<uint32_t>index)
            elif swept:
                self._pack(self.own)
        return self.out_bytes

    @property
    def raw(self):
        """The batch as one complete ``ram`` section of the stream; valid until ``next``."""
        return memoryview(<uint8_t[:self.out_bytes]> self.out) if self.out_bytes else memoryview(b"")

    @property
    def runs(self):
        """Its index runs: packed little-endian (u32 block, u32 pages, u64 first_page,
        u32 kind, u32 raw_offset), in target pages."""
        return PyBytes_FromStringAndSize(<char *>self.packed, self.packed_count * sizeof(PackedRun))

    cdef void _pack(self, Slab *slab) noexcept nogil:
        """Records of QEMU's ``ram`` section (migration/ram.c: ram_save_page), one section."""
        cdef uint8_t *to = self.out
        cdef uint8_t *page
        cdef uint32_t i, k
        cdef uint64_t n, total, offset
        cdef int64_t last_block = -1
        cdef int kind
        cdef Block *b
        cdef Run *run
        to[0] = 0x02                                # QEMU_VM_SECTION_PART
        sf_put_be32(to + 1, self.capture.section_id)
        to += 5
        for i in range(slab.runs):
            run = &slab.run[i]
            b = &self.capture.blocks[run.block]
            offset = run.first_page << b.shift
            total = (<uint64_t>run.pages) << (b.shift - 12)
            total = min(total, b.target_pages - min(b.target_pages, offset >> 12))
            page = slab.data + run.data_offset
            for n in range(total):
                kind = KIND_ZERO
                if run.kind == KIND_DATA and not sf_is_zero(page, TARGET_PAGE):
                    kind = KIND_DATA
                self._index(run.block, (offset >> 12) + n, kind, to - self.out)
                # RAM_SAVE_FLAG_ZERO 0x02, PAGE 0x08, CONTINUE 0x20
                sf_put_be64(to, (offset + (n << 12)) | (0x08 if kind == KIND_DATA else 0x02)
                            | (0x20 if last_block == run.block else 0))
                to += 8
                if last_block != run.block:
                    last_block = run.block
                    to[0] = b.idlen
                    memcpy(to + 1, b.idstr, b.idlen)
                    to += 1 + b.idlen
                if kind == KIND_DATA:
                    memcpy(to, page, TARGET_PAGE)
                    to += TARGET_PAGE
                else:
                    to[0] = 0
                    to += 1
                if run.kind == KIND_DATA:
                    page += TARGET_PAGE
                    if kind == KIND_DATA:
                        sf_fetch_add(&self.capture.pages_data, 1)
                    else:
                        sf_fetch_add(&self.capture.pages_zero, 1)
            if run.kind == KIND_ZERO:
                sf_fetch_add(&self.capture.pages_zero, total)
                sf_fetch_add(&self.capture.pages_absent, total)
        sf_put_be64(to, 0x10)                       # RAM_SAVE_FLAG_EOS
        to[8] = 0x7e                                # QEMU_VM_SECTION_FOOTER
        sf_put_be32(to + 9, self.capture.section_id)
        self.out_bytes = to + 13 - self.out

    cdef void _index(self, uint32_t block, uint64_t page, int kind, uint64_t raw_offset) noexcept nogil:
        cdef PackedRun *last
        if self.packed_count:
            last = &self.packed[self.packed_count - 1]
            if last.block == block and last.kind == <uint32_t>kind and last.first_page + last.pages == page:
                last.pages += 1
                return
        last = &self.packed[self.packed_count]
        last.block = block
        last.pages = 1
        last.first_page = page
        last.kind = kind
        last.raw_offset = <uint32_t>raw_offset
        self.packed_count += 1
