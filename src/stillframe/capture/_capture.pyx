# cython: language_level=3, boundscheck=False, wraparound=False, cdivision=True, initializedcheck=False
# cython: freethreading_compatible=True
"""The capture core: what must run without the GIL (DESIGN section 7).

One fault thread runs ``fault_loop``; any number of workers run ``Worker.next``. This file is the
door to Python; the work is in the ``.pxd`` beside it, compiled into this one module:
``_core`` (shared state), ``_blocks``, ``_protection``, ``_dirty``, ``_events``, ``_holes``, ``_pins``, ``_claims``,
``_faults``, ``_spill``, ``_packing``, ``_swap``.
Source of the kernel's side: Documentation/admin-guide/mm/userfaultfd.rst.
"""

from cpython.bytes cimport PyBytes_FromStringAndSize
from libc.stdint cimport int64_t, uint8_t, uint32_t, uint64_t
from libc.stdlib cimport calloc, free

from ._blocks cimport add_block, mark, mark_from_pagemap, runs_of
from ._claims cimport capture_range, sweep
from ._core cimport *
from ._dirty cimport (
    Taken, TakenRuns, begin_job, capture_nothing, capture_range_anew, protect_noted,
)
from ._faults cimport fault_loop
from ._holes cimport take_hold
from ._packing cimport Batch, PackedRun, batch_bytes, pack
from ._protection cimport protect, unregister
from ._spill cimport (
    end_growing, give_back, grow, grow_ahead, hand_on, ring_init, slabs_used, take_full,
)
from ._sys cimport *

cdef enum:
    MOST_PINS = 16384           # IORING_MAX_REG_BUFFERS
    MOST_PINNED = 1 << 30       # bytes of one

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


def private_runs(const uint64_t[::1] entries, uint64_t first_page):
    """Runs (first page, pages) of a private mapping's own pages among entries of a pagemap, the
    first of which is ``first_page``'s: present or in swap, and not the file's. A write-protected
    empty page shows as swap of type 31 (see ``sf_is_swapped``); a page whose swap type is hidden counts."""
    cdef uint64_t entry, i, start = 0, end = 0
    found = []
    for i in range(<uint64_t>entries.shape[0]):
        entry = entries[i]
        if (entry >> 61) & 1 or not (entry >> 63 or sf_is_swapped(entry)):
            continue
        if i != end or end == start:
            if end > start:
                found.append((first_page + start, end - start))
            start = i
        end = i + 1
    if end > start:
        found.append((first_page + start, end - start))
    return found


def may_swap_out(int pidfd):
    """Whether we may have pages of a process reclaimed: 0 or -errno."""
    return sf_swap_out_process(pidfd, 0, 0)


def map_file(int fd, uint64_t length_bytes, uint64_t offset_bytes):
    """Map a file only to look at it, reserving nothing; its address, or -errno."""
    cdef void *address = sf_map_file(fd, length_bytes, offset_bytes)
    return <uint64_t>address if address != NULL else -errno


def unmap_file(uint64_t address, uint64_t length_bytes):
    """Undo ``map_file``."""
    sf_unmap_file(<void *>address, length_bytes)


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

    cdef Core core

    def __cinit__(self, int uffd, int stop_fd, int pid, blocks, *, uint64_t slab_bytes,
                  uint32_t spill_slabs, uint64_t max_window_bytes, bint by_signal=False,
                  int task_fd=-1, int asked_fd=-1):
        cdef Core *core = &self.core
        cdef uint32_t i
        core.uffd = uffd
        core.stop_fd = stop_fd
        core.pid = pid
        core.task_fd = task_fd
        core.by_signal = by_signal
        core.pagemap_fd = core.pidfd = -1
        core.max_window_bytes = min(max_window_bytes, slab_bytes)
        core.spill.slab_bytes = slab_bytes
        core.spill.limit = spill_slabs
        core.spill.current = -1
        core.spill.asked_fd = asked_fd
        pthread_mutex_init(&core.spill.worker_lock, NULL)
        core.block_count = len(blocks)
        core.blocks = <Block *>calloc(core.block_count + 1, sizeof(Block))
        core.spill.slabs = <Slab *>calloc(spill_slabs, sizeof(Slab))
        if core.blocks == NULL or core.spill.slabs == NULL:
            raise MemoryError()
        ring_init(&core.spill.full, spill_slabs)
        ring_init(&core.spill.empty, spill_slabs)
        for i in range(core.block_count):
            add_block(core, i, blocks[i])

    def __dealloc__(self):
        cdef Spill *spill = &self.core.spill
        cdef uint64_t i
        if self.core.blocks != NULL:
            self._let_go()
            for i in range(self.core.block_count):
                free(self.core.blocks[i].claim)
            free(self.core.blocks)
        if spill.slabs != NULL:
            for i in range(spill.grown):
                munmap(spill.slabs[i].data, spill.slab_bytes)
            free(spill.slabs)
        free(spill.full.slot)
        free(spill.empty.slot)
        pthread_mutex_destroy(&spill.worker_lock)

    def let_go(self):
        """Hold nothing of the VM's memory any more. Nobody copies by now."""
        self._let_go()

    cdef void _let_go(self) noexcept:
        cdef uint32_t i
        cdef Block *b
        for i in range(self.core.block_count):
            b = &self.core.blocks[i]
            sf_pins_free(b.pins)
            b.pins = NULL
            if b.looked_at:
                sf_unmap_file(<void *>b.looked_at, b.pages << b.shift)
                b.looked_at = 0

    # --- setup ----------------------------------------------------------------

    def set_section_id(self, uint32_t section_id):
        self.core.section_id = section_id

    cdef Block *_range(self, uint32_t block, uint64_t first_page, uint64_t pages) except NULL:
        if block >= self.core.block_count:
            raise ValueError("no such block")
        if pages > self.core.blocks[block].pages or first_page > self.core.blocks[block].pages - pages:
            raise ValueError("pages outside the block")
        return &self.core.blocks[block]

    def mark_populated(self, uint32_t block, uint64_t first_page, uint64_t pages):
        cdef Block *b = self._range(block, first_page, pages)
        with nogil:
            mark(b.populated, first_page, pages)

    def track_changes(self, uint32_t block):
        """Capture only what is changed: what ``mark_changed`` says, and what is noted from now on.
        Before the first ``protect_noted``."""
        cdef Block *b = self._range(block, 0, 0)
        with nogil:
            capture_nothing(&self.core, b)

    def mark_changed(self, uint32_t block, uint64_t first_page, uint64_t pages):
        cdef Block *b = self._range(block, first_page, pages)
        with nogil:
            capture_range_anew(&self.core, b, first_page, pages)

    def mark_populated_from_pagemap(self, uint32_t block, const uint64_t[::1] entries, uint64_t first_page):
        """Entries of /proc/PID/pagemap, one per 4 KiB (Documentation/admin-guide/mm/pagemap.rst)."""
        cdef uint64_t n = entries.shape[0]
        cdef Block *b = self._range(block, first_page, 0)
        cdef int step = b.shift - TARGET_SHIFT
        self._range(block, first_page, (n + (1 << step) - 1) >> step)
        if n:
            with nogil:
                mark_from_pagemap(b, &entries[0], n, first_page)

    def mark_populated_on_hugetlbfs(self, uint32_t block, uint64_t address, int uffd, uint64_t page_bytes):
        """Mark what is there of the block's file, which we map at ``address`` and have registered
        with ``uffd``; from now on a copy fails whose page was punched out since."""
        cdef Block *b = self._range(block, 0, 0)
        cdef uint64_t page
        b.held = address
        b.held_uffd = uffd
        b.held_shift = sf_log2(page_bytes)
        with nogil:
            for page in range(b.pages):
                if take_hold(b, page):
                    b.populated[page >> 6] |= (<uint64_t>1) << (page & 63)
        if b.read_fd >= 0:          # else pages of its own hide the file's
            b.holes = HOLES_HUGETLB

    def pin(self, uint32_t block):
        """Hold what is populated of a block of shared memory in small pages, so that what is punched
        out of its file later can be saved; before the instant. 0 or -errno."""
        cdef Block *b = self._range(block, 0, 0)
        cdef sf_pin_run *runs
        cdef unsigned n = 0
        cdef int rc = 0
        cdef uint64_t first, pages, part
        if not sf_is_in_memory(b.read_fd, b.read_offset, b.pages << b.shift):
            return -EAGAIN          # the host is short of memory: not all of it at once
        found = []
        for first, pages in runs_of(b.populated, b.pages):
            while pages:
                part = min(pages, MOST_PINNED >> b.shift)
                found.append((part, first))
                first += part
                pages -= part
        # The largest, as many as one io_uring takes; of the others a drop fails the snapshot.
        found = sorted(sorted(found, reverse=True)[:MOST_PINS], key=lambda run: run[1])
        runs = <sf_pin_run *>calloc(len(found) + 1, sizeof(sf_pin_run))
        if runs == NULL:
            return -ENOMEM
        for part, first in found:
            runs[n].offset = first << b.shift
            runs[n].length = part << b.shift
            n += 1
        with nogil:
            if n:
                b.pins = sf_pins_new(b.read_fd, b.read_offset, b.pages << b.shift, runs, n)
                rc = 0 if b.pins != NULL else -errno
        free(runs)
        return rc

    def swap_out_again(self, int pagemap_fd, int pidfd, bint narrowly):
        """Workers leave in swap what is there; between two jobs. The descriptors stay the
        caller's."""
        cdef uint32_t i
        cdef Block *b
        self.core.pagemap_fd = pagemap_fd
        self.core.pidfd = pidfd
        if narrowly:    # faults copy nothing but the page that was touched, which is in memory
            self.core.max_window_bytes = TARGET_PAGE
        for i in range(self.core.block_count):
            b = &self.core.blocks[i]
            if b.read_fd >= 0 and b.shift == TARGET_SHIFT and b.looked_at == 0:
                b.looked_at = <uint64_t>sf_map_file(b.read_fd, b.pages << b.shift, b.read_offset)

    def populated_pages(self):
        """Target pages that were populated when that was looked at last. Walks all bitmaps."""
        cdef uint64_t pages = 0, word
        cdef uint32_t i
        cdef Block *b
        with nogil:
            for i in range(self.core.block_count):
                b = &self.core.blocks[i]
                for word in range(words(b)):
                    pages += (<uint64_t>sf_popcount(b.populated[word])) << (b.shift - TARGET_SHIFT)
        return pages

    def populated_runs(self, uint32_t block):
        """Runs (first page, pages) of a block that were populated then."""
        cdef Block *b = self._range(block, 0, 0)
        return runs_of(b.populated, b.pages)

    def grow_spill(self, uint32_t slabs):
        """Map so many slabs now; how many there are then. By one thread at a time: before, or as,
        ``spill_loop``."""
        with nogil:
            while slabs and grow(&self.core.spill):
                slabs -= 1
        return self.core.spill.grown

    def spill_loop(self):
        """Map slabs ahead of need, up to the limit, until ``end_spill``; in a thread of its own:
        the fault thread allocates nothing, and the workers may be busy for milliseconds."""
        with nogil:
            grow_ahead(&self.core.spill)

    def end_spill(self):
        end_growing(&self.core.spill)

    # --- protection and dirty tracking ------------------------------------------

    def protect(self, uint32_t block, uint64_t first_page, uint64_t pages):
        cdef Block *b = self._range(block, first_page, pages)
        cdef int rc
        with nogil:
            rc = protect(&self.core, b, first_page, pages)
        return rc

    def unregister(self, uint32_t block, uint64_t first_page, uint64_t pages):
        cdef Block *b = self._range(block, first_page, pages)
        cdef int rc
        with nogil:
            rc = unregister(&self.core, b, first_page, pages)
        return rc

    def protect_noted(self):
        """Protect again what was written since; returns the pages, or -errno."""
        cdef TakenRuns nobody
        cdef int64_t result
        nobody.run = NULL
        with nogil:
            result = protect_noted(&self.core, &nobody)
        return result

    def track_finely(self):
        """Note few pages more than are written, at the price of more faults; before any write."""
        self.core.finely = True

    def stay(self):
        """Pages stay protected after their copy, and the next write to one is noted; before any job."""
        self.core.staying = self.core.finely = True

    def wanted_pages(self):
        """How many target pages the next job is to capture, as far as is known."""
        return self.core.wanted

    def begin_job(self):
        """While held, after the last ``protect_noted``: the next job captures what was written since
        the last one, or all. Returns how many target pages; counters begin anew."""
        return begin_job(&self.core)

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
                result = protect_noted(&self.core, &runs)
            if result < 0:
                return result
            return [(runs.run[i].block, runs.run[i].first_page, runs.run[i].pages)
                    for i in range(runs.count)]
        finally:
            free(runs.run)

    def noted_runs(self, uint32_t most=4096):
        """Runs (block, first page, pages) noted and not yet protected again."""
        cdef uint32_t i
        found = []
        for i in range(self.core.block_count):
            found += [(i, first, pages)
                      for first, pages in runs_of(self.core.blocks[i].noted, self.core.blocks[i].pages)]
        return found[:most]

    # --- phases, and the fault thread ---------------------------------------------

    def set_phase(self, uint64_t phase):
        """Switch the phase and wait until no fault is handled under the old one."""
        cdef uint64_t before = self.core.phase
        with nogil:
            sf_store_sc(&self.core.phase, phase)
            sf_futex_wake(&self.core.spill.freed)
            # None is while held; one of the new phase may wait for room already.
            if before != HOLD:
                await_even(&self.core.serving)
            await_even(&self.core.reading)

    def await_fault(self):
        """Wait until the fault that is being served now, if any, has been served."""
        with nogil:
            await_even(&self.core.serving)

    def fault_loop(self):
        """Serve faults until ``stop_fd`` becomes readable; returns 0 or -errno."""
        cdef int rc
        with nogil:
            rc = fault_loop(&self.core)
        return rc

    @property
    def is_serving(self):
        """Whether the fault thread has entered ``fault_loop``, which never takes the GIL."""
        return sf_load(&self.core.looping) != 0

    def flush(self):
        """Hand the fault thread's last, partly filled slab to the workers: after it ended, or while
        armed, when it fills none."""
        hand_on(&self.core.spill)

    # --- what happened --------------------------------------------------------------

    def failure(self):
        """(error, lost): -errno or 0, and what was lost (kind, address, length) or None."""
        cdef Core *core = &self.core
        return core.error, ((core.lost_kind, core.lost_hva, core.lost_length) if core.lost_kind else None)

    def statistics(self):
        cdef Core *core = &self.core
        error, lost = self.failure()
        return {
            "faults": core.count.faults,
            "armed_faults": core.count.armed_faults,
            "fault_p50_us": self._quantile_us(50),
            "fault_p99_us": self._quantile_us(99),
            "fault_max_us": core.count.fault_max_ns / 1000.0,
            "stall_ms": core.spill.stall_ns / 1e6,
            "stalls": core.spill.stalls,
            "spill_used_bytes": slabs_used(&core.spill) * core.spill.slab_bytes,
            "spill_peak_bytes": core.spill.peak * core.spill.slab_bytes,
            "pages_done": core.count.pages_done,
            "pages_faulted": core.count.pages_faulted,
            "pages_zero": core.count.pages_zero,
            "pages_data": core.count.pages_data,
            "pages_never_populated": core.count.pages_absent,
            "error": error,
            "lost": lost,
        }

    cdef double _quantile_us(self, uint64_t percent):
        cdef uint64_t total = 0, seen = 0, value
        cdef uint32_t i
        for i in range(BUCKETS):
            total += self.core.count.buckets[i]
        for i in range(BUCKETS):
            seen += self.core.count.buckets[i]
            if total and seen * 100 >= total * percent:
                value = i if i < 8 else ((<uint64_t>(8 + (i & 7))) << ((i >> 3) - 1))
                return value / 1000.0
        return 0.0


cdef class Worker:
    """One worker's buffers: a slab of its own, the packed records, their index runs."""

    cdef Capture capture
    cdef Slab *own
    cdef Batch batch
    cdef int64_t pending

    def __cinit__(self, Capture capture not None):
        cdef uint64_t slab_bytes = capture.core.spill.slab_bytes
        self.capture = capture
        self.pending = -1
        self.batch.size = batch_bytes(slab_bytes)
        self.batch.most_runs = (slab_bytes >> TARGET_SHIFT) + MAX_RUNS
        self.own = <Slab *>calloc(1, sizeof(Slab))
        self.batch.run = <PackedRun *>calloc(self.batch.most_runs, sizeof(PackedRun))
        self.batch.origin = <PackedRun *>calloc(MAX_RUNS, sizeof(PackedRun))
        if self.own == NULL or self.batch.run == NULL or self.batch.origin == NULL:
            raise MemoryError()
        self.own.data = <uint8_t *>sf_map_populated(slab_bytes)
        self.batch.out = <uint8_t *>sf_map_populated(self.batch.size)
        if self.own.data == NULL or self.batch.out == NULL:
            raise MemoryError()

    def __dealloc__(self):
        if self.own != NULL:
            if self.own.data != NULL:
                munmap(self.own.data, self.capture.core.spill.slab_bytes)
            free(self.own)
        if self.batch.out != NULL:
            munmap(self.batch.out, self.batch.size)
        free(self.batch.run)
        free(self.batch.origin)

    def next(self):
        """Capture and pack the next batch; returns its bytes, 0 when there is none now."""
        cdef Core *core = &self.capture.core
        cdef int64_t index
        cdef bint swept = False
        with nogil:
            index = take_full(&core.spill, False)
            if index < 0:
                swept = sweep(core, self.own, &self.pending)
                if not swept:
                    index = take_full(&core.spill, True)
            self._pack(index, swept)
        return self.batch.bytes

    def take(self, uint32_t block, uint64_t first_page, uint64_t pages):
        """As ``next``, of what nobody has claimed yet of a range (target pages, one slab at most)."""
        cdef Core *core = &self.capture.core
        cdef Block *b = self.capture._range(block, 0, 0)
        cdef int step = b.shift - TARGET_SHIFT
        cdef uint64_t first = first_page >> step
        cdef uint64_t end = min((first_page + pages + (1 << step) - 1) >> step, b.pages)
        if self.pending >= 0:
            raise ValueError("this worker sweeps")
        if first >= end or (end - first) << b.shift > core.spill.slab_bytes:
            raise ValueError("pages outside the block, or too many")
        with nogil:
            self.own.used = self.own.absent = self.own.runs = 0
            capture_range(core, block, first, end - first, self.own, False)
            self._pack(-1, self.own.runs > 0)
        return self.batch.bytes

    def take_spilled(self):
        """As ``next``, of what faults claimed only."""
        with nogil:
            self._pack(take_full(&self.capture.core.spill, True), False)
        return self.batch.bytes

    cdef void _pack(self, int64_t index, bint own) noexcept nogil:
        """Pack a slab of the spill (-1: none), or our own."""
        cdef Core *core = &self.capture.core
        self.batch.bytes = self.batch.runs = self.batch.origins = 0
        if index >= 0:
            pack(core, &core.spill.slabs[index], &self.batch, True)
            give_back(&core.spill, <uint32_t>index)
        elif own:
            pack(core, self.own, &self.batch, False)

    @property
    def raw(self):
        """The batch as one complete ``ram`` section of the stream; valid until ``next``."""
        return memoryview(<uint8_t[:self.batch.bytes]> self.batch.out) if self.batch.bytes else memoryview(b"")

    @property
    def runs(self):
        """Its index runs: packed little-endian (u32 block, u32 pages, u64 first_page,
        u32 kind, u32 raw_offset), in target pages."""
        return PyBytes_FromStringAndSize(<char *>self.batch.run, self.batch.runs * sizeof(PackedRun))

    @property
    def origins(self):
        """What of it was never populated, and what a fault saved: packed as ``runs``, with the bits
        of ``still.page_origins`` as kind."""
        return PyBytes_FromStringAndSize(<char *>self.batch.origin, self.batch.origins * sizeof(PackedRun))
