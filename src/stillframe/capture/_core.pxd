"""The state that the parts of the core share: blocks with their page bitmaps, phase, counters.

The locking discipline is at the head of ``_capture_sys.h``.
"""

from libc.stdint cimport int32_t, int64_t, uint8_t, uint32_t, uint64_t

from ._sys cimport *

cdef enum:
    ARMED = 0
    HOLD = 1
    ACTIVE = 2
    RELEASE = 3
    GONE_REMOVED = 1
    GONE_UNMAPPED = 2
    GONE_HOLE = 3
    HOLES_NONE = 0          # who drops RAM tells, or there is no telling
    HOLES_SHMEM = 1         # cachestat shows them
    HOLES_HUGETLB = 2       # our own mapping loses a page that is punched out
    KIND_ZERO = 0
    KIND_DATA = 1
    TARGET_PAGE = 4096
    TARGET_SHIFT = 12
    MAX_RUNS = 1024
    MAX_ABSENT = 65536      # never-populated pages that one batch may describe
    MESSAGES = 1024
    BUCKETS = 512           # fault times: 8 linear steps per power of two of nanoseconds

cdef struct Block:
    uint64_t hva
    uint64_t pages
    uint64_t unit           # pages that the sweep claims at once
    uint64_t units
    uint64_t target_pages   # what goes into the stream; a last huge page may be longer
    uint64_t read_offset
    int read_fd             # -1: process_vm_readv
    int holes               # how pages that were punched out of the file show
    uint64_t held           # where we map its file: see _holes
    int held_uffd
    int held_shift          # its file's page size
    sf_pins *pins           # its pages as they were: see _pins; NULL: nobody holds them
    uint64_t looked_at      # where we map its file to have pages of it reclaimed: see _swap; 0: not
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
    uint64_t *unpinned      # what is pinned of these is not the instant's

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

cdef struct Ring:
    uint64_t head           # next to take
    uint64_t tail           # next to put
    uint64_t mask
    uint32_t *slot

cdef struct Spill:
    Slab *slabs
    uint64_t slab_bytes
    uint64_t limit          # slabs; lowered when there is no memory for more
    uint64_t grown
    int64_t current         # what the fault thread fills; -1: none
    int asked_fd            # eventfd: that slab is to be handed on as it is; -1: nobody asks
    Ring full, empty
    pthread_mutex_t worker_lock
    uint32_t freed          # futex word: bumped when a slab becomes free
    uint32_t low            # futex word: bumped when vacant slabs become few
    uint64_t waiting, ended, peak
    uint64_t stalls, stall_ns

cdef struct Counters:
    uint64_t faults, armed_faults, fault_max_ns
    uint64_t pages_done, pages_faulted, pages_zero, pages_data, pages_absent
    uint64_t buckets[BUCKETS]

cdef struct Core:
    int uffd, stop_fd, pid
    int task_fd             # /proc/PID/task, to see a drop coming; -1: not to be had
    int32_t drop_tid        # who dropped last
    int pagemap_fd, pidfd   # of the process, if what is swapped in is swapped out again; -1: it is not
    bint by_signal          # uffd is the pipe of the SIGSEGV handler
    bint blocked            # an event kept the fault thread from un-protecting
    bint finely             # while armed, only what is written is to be noted
    bint staying            # a page stays protected after its copy: its next write is to be noted
    Block *blocks
    uint32_t block_count
    uint32_t section_id
    uint64_t phase, cursor, units_total
    uint64_t wanted         # target pages that the next job is to capture
    uint64_t looping            # the fault thread needs Python no more
    uint64_t serving, reading   # odd while a fault is served, while messages are read
    uint64_t max_window_bytes
    Spill spill
    Counters count
    int64_t error
    uint64_t lost_taken, lost_kind, lost_hva, lost_length
    sf_uffd_msg queue[MESSAGES]
    uint32_t queue_head, queue_tail


cdef inline bint has(const uint64_t *bits, uint64_t page) noexcept nogil:
    return (sf_load(&bits[page >> 6]) >> (page & 63)) & 1

cdef inline uint64_t words(const Block *b) noexcept nogil:
    return (b.pages + 63) >> 6

cdef inline Block *block_at(Core *core, uint64_t address, uint32_t *index) noexcept nogil:
    cdef uint32_t i
    cdef Block *b
    for i in range(core.block_count):
        b = &core.blocks[i]
        if b.hva <= address < b.hva + (b.pages << b.shift):
            index[0] = i
            return b
    return NULL

cdef inline void await_even(const uint64_t *sequence) noexcept nogil:
    cdef uint64_t seen = sf_load_sc(sequence)
    while seen & 1 and sf_load_sc(sequence) == seen:
        sched_yield()

cdef inline void fail(Core *core, int64_t error) noexcept nogil:
    if core.error == 0:
        core.error = error

cdef inline void lost(Core *core, uint64_t kind, uint64_t hva, uint64_t length) noexcept nogil:
    if sf_exchange(&core.lost_taken, 1) == 0:
        core.lost_hva = hva
        core.lost_length = length
        sf_store(&core.lost_kind, kind)
