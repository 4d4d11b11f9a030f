"""Pack a slab into one complete ``ram`` section of QEMU's stream (migration/ram.c:
ram_save_page), with the index runs of what is in it. The flags are ``vmstate.wire.RamFlag``."""

from libc.stdint cimport int64_t, uint8_t, uint32_t, uint64_t
from libc.string cimport memcpy

from ._core cimport *
from ._sys cimport *

cdef enum:
    SECTION_PART = 0x02         # QEMU_VM_SECTION_PART
    SECTION_FOOTER = 0x7e
    FLAG_ZERO = 0x02            # RAM_SAVE_FLAG_...
    FLAG_PAGE = 0x08
    FLAG_EOS = 0x10
    FLAG_CONTINUE = 0x20
    HEAD_BYTES = 5
    TAIL_BYTES = 13
    ORIGIN_NEVER = 1            # never populated at the instant; as still/page_origins.py
    ORIGIN_FAULT = 2            # saved by whoever was about to write to it
    NAME_BYTES = 256            # with its length

cdef struct PackedRun:          # little-endian, as store/index reads it; in target pages
    uint32_t block
    uint32_t pages
    uint64_t first_page
    uint32_t kind
    uint32_t raw_offset

cdef struct Batch:
    uint8_t *out
    uint64_t bytes, size
    PackedRun *run
    uint64_t runs, most_runs
    PackedRun *origin           # of a slab's runs, those that came otherwise than by the sweep of content
    uint64_t origins


cdef inline uint64_t batch_bytes(uint64_t slab_bytes) noexcept nogil:
    """The most that a slab becomes."""
    return ((slab_bytes >> TARGET_SHIFT) * (TARGET_PAGE + 8) + MAX_ABSENT * 9
            + MAX_RUNS * NAME_BYTES + HEAD_BYTES + TAIL_BYTES)

cdef inline void pack(Core *core, const Slab *slab, Batch *batch, bint by_fault) noexcept nogil:
    cdef uint8_t *to = batch.out
    cdef const uint8_t *page
    cdef uint32_t i
    cdef uint64_t n, total, offset, zero = 0, data = 0, absent = 0
    cdef int64_t last_block = -1
    cdef int kind
    cdef const Block *b
    cdef const Run *run
    cdef PackedRun *origin
    batch.runs = batch.origins = 0
    to[0] = SECTION_PART
    sf_put_be32(to + 1, core.section_id)
    to += HEAD_BYTES
    for i in range(slab.runs):
        run = &slab.run[i]
        b = &core.blocks[run.block]
        offset = run.first_page << b.shift
        total = (<uint64_t>run.pages) << (b.shift - TARGET_SHIFT)
        total = min(total, b.target_pages - min(b.target_pages, offset >> TARGET_SHIFT))
        page = slab.data + run.data_offset
        if by_fault or run.kind == KIND_ZERO:
            origin = &batch.origin[batch.origins]
            origin.block = run.block
            origin.pages = <uint32_t>total
            origin.first_page = offset >> TARGET_SHIFT
            origin.kind = (ORIGIN_FAULT if by_fault else 0) | (ORIGIN_NEVER if run.kind == KIND_ZERO else 0)
            origin.raw_offset = 0
            batch.origins += 1
        for n in range(total):
            kind = KIND_ZERO
            if run.kind == KIND_DATA:
                if not sf_is_zero(page, TARGET_PAGE):
                    kind = KIND_DATA
            _index(batch, run.block, (offset >> TARGET_SHIFT) + n, kind, to - batch.out)
            sf_put_be64(to, (offset + (n << TARGET_SHIFT)) | (FLAG_PAGE if kind == KIND_DATA else FLAG_ZERO)
                        | (FLAG_CONTINUE if last_block == run.block else 0))
            to += 8
            if last_block != run.block:
                last_block = run.block
                to[0] = b.idlen
                memcpy(to + 1, b.idstr, b.idlen)
                to += 1 + b.idlen
            if kind == KIND_DATA:
                memcpy(to, page, TARGET_PAGE)
                to += TARGET_PAGE
                data += 1
            else:
                to[0] = 0
                to += 1
                zero += 1
            if run.kind == KIND_DATA:
                page += TARGET_PAGE
        if run.kind == KIND_ZERO:
            absent += total
    sf_put_be64(to, FLAG_EOS)
    to[8] = SECTION_FOOTER
    sf_put_be32(to + 9, core.section_id)
    batch.bytes = to + TAIL_BYTES - batch.out
    sf_assert(batch.bytes <= batch.size)
    sf_fetch_add(&core.count.pages_zero, zero)
    sf_fetch_add(&core.count.pages_data, data)
    sf_fetch_add(&core.count.pages_absent, absent)

cdef inline void _index(Batch *batch, uint32_t block, uint64_t page, int kind, uint64_t raw_offset) noexcept nogil:
    cdef PackedRun *last
    if batch.runs:
        last = &batch.run[batch.runs - 1]
        if last.block == block and last.kind == <uint32_t>kind and last.first_page + last.pages == page:
            last.pages += 1
            return
    sf_assert(batch.runs < batch.most_runs)
    last = &batch.run[batch.runs]
    last.block = block
    last.pages = 1
    last.first_page = page
    last.kind = kind
    last.raw_offset = <uint32_t>raw_offset
    batch.runs += 1
