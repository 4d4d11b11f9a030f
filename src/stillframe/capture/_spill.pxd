"""The spill: bounded memory, in slabs, for copies of faulted pages until a worker takes them.

The fault thread takes from ``empty`` and puts into ``full``, the workers the other way round.
"""

from libc.stdint cimport int64_t, uint8_t, uint32_t, uint64_t
from libc.stdlib cimport calloc

from ._core cimport *
from ._sys cimport *

cdef enum:
    LOW_SLABS = 24          # with fewer vacant, the spill thread maps more
    DRAIN_SLABS = 32        # with more used, full ones come before the sweep


cdef inline int ring_init(Ring *ring, uint64_t least) except -1:
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
    sf_assert(ring.tail - sf_load(&ring.head) <= ring.mask)
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

cdef inline uint64_t slabs_used(Spill *spill) noexcept nogil:
    cdef uint64_t vacant = ring_count(&spill.empty)
    cdef uint64_t grown = sf_load(&spill.grown)
    return grown - min(vacant, grown)

cdef inline bint grow(Spill *spill) noexcept nogil:
    """Map one more slab; False at the limit, or where there is no memory: the limit is here then."""
    cdef uint8_t *data
    if spill.grown >= sf_load(&spill.limit):
        return False
    data = <uint8_t *>sf_map_populated(spill.slab_bytes)
    if data == NULL:
        sf_store(&spill.limit, spill.grown)
        return False
    spill.slabs[spill.grown].data = data
    # Counted before it can be taken, so the used ones never come out negative.
    sf_store(&spill.grown, spill.grown + 1)
    give_back(spill, <uint32_t>spill.grown - 1)
    return True

cdef inline void grow_ahead(Spill *spill) noexcept nogil:
    """Map slabs ahead of need, until ``end_growing``."""
    cdef uint32_t seen
    while not sf_load(&spill.ended):
        seen = sf_word(&spill.low)
        if ring_count(&spill.empty) < LOW_SLABS:
            if not grow(spill):
                break
        else:
            sf_futex_wait(&spill.low, seen, 100000000)

cdef inline void end_growing(Spill *spill) noexcept nogil:
    sf_store(&spill.ended, 1)
    sf_bump(&spill.low)
    sf_futex_wake(&spill.low)

# --- the workers' side

cdef inline int64_t take_full(Spill *spill, bint always) noexcept nogil:
    """The oldest full slab, if there are many or ``always``; -1: none."""
    cdef int64_t index = -1
    pthread_mutex_lock(&spill.worker_lock)
    # Of the limit as it is now: where there is no memory for more, few are many.
    if always or slabs_used(spill) > min(sf_load(&spill.limit) // 4, <uint64_t>DRAIN_SLABS):
        index = ring_take(&spill.full)
    pthread_mutex_unlock(&spill.worker_lock)
    return index

cdef inline void give_back(Spill *spill, uint32_t index) noexcept nogil:
    pthread_mutex_lock(&spill.worker_lock)
    ring_put(&spill.empty, index)
    pthread_mutex_unlock(&spill.worker_lock)
    sf_bump(&spill.freed)
    if sf_load_sc(&spill.waiting):
        sf_futex_wake(&spill.freed)

# --- the fault thread's side

cdef inline Slab *current_slab(Spill *spill, uint64_t length) noexcept nogil:
    """The slab under way, if it takes ``length`` more bytes; NULL: it was handed on."""
    cdef Slab *slab
    if spill.current < 0:
        return NULL
    slab = &spill.slabs[spill.current]
    if (slab.used + length <= spill.slab_bytes and slab.runs + (length >> TARGET_SHIFT) + 2 <= MAX_RUNS
            and slab.absent + (length >> TARGET_SHIFT) <= MAX_ABSENT):
        return slab
    hand_on(spill)
    return NULL

cdef inline void hand_on(Spill *spill) noexcept nogil:
    """Give the slab under way to the workers."""
    if spill.current >= 0:
        ring_put(&spill.full, <uint32_t>spill.current)
        spill.current = -1

cdef inline Slab *begin_slab(Spill *spill, int64_t index) noexcept nogil:
    cdef Slab *slab = &spill.slabs[index]
    if sf_load(&spill.grown) < sf_load(&spill.limit) and ring_count(&spill.empty) < LOW_SLABS:
        sf_bump(&spill.low)
        sf_futex_wake(&spill.low)
    spill.current = index
    slab.used = slab.absent = slab.runs = 0
    spill.peak = max(spill.peak, slabs_used(spill))
    return slab
