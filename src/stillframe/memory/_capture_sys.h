/* System calls, atomics and byte scans that Cython cannot express.
 *
 * Locking discipline of the whole core, in one place (but for the SIGSEGV handler's, which is
 * at the head of _signal_faults.h):
 *   - page bitmaps (claim, done, noted, faulted, removed) are only touched with the
 *     atomic helpers below; `populated` and `fresh` belong to the job's thread until the
 *     job goes active, and are frozen from then on;
 *   - the two slab rings have one producer and one consumer side each; the
 *     workers' side is serialised by `worker_lock`, the fault thread takes no lock;
 *   - everything else is written by one thread and read by others as statistics.
 */
#ifndef STILLFRAME_CAPTURE_SYS_H
#define STILLFRAME_CAPTURE_SYS_H

#include <errno.h>
#include <linux/futex.h>
#include <poll.h>
#include <sched.h>
#include <stdint.h>
#include <string.h>
#include <sys/ioctl.h>
#include <sys/mman.h>
#include <sys/syscall.h>
#include <sys/uio.h>
#include <time.h>
#include <unistd.h>

/* Own copies: distribution headers are older than the kernel we need
 * (Linux include/uapi/linux/userfaultfd.h). */
struct sf_uffd_msg {
    uint8_t event;
    uint8_t reserved1;
    uint16_t reserved2;
    uint32_t reserved3;
    uint64_t arg0; /* pagefault: flags;   remove, unmap: start;  remap: from */
    uint64_t arg1; /* pagefault: address; remove, unmap: end;    remap: to */
    uint64_t arg2; /* remap: length */
};
struct sf_uffd_range { uint64_t start, len; };
struct sf_uffd_writeprotect { struct sf_uffd_range range; uint64_t mode; };

#define SF_UFFDIO_WAKE         _IOR(0xAA, 0x02, struct sf_uffd_range)
#define SF_UFFDIO_UNREGISTER   _IOR(0xAA, 0x01, struct sf_uffd_range)
#define SF_UFFDIO_WRITEPROTECT _IOWR(0xAA, 0x06, struct sf_uffd_writeprotect)

static inline uint64_t sf_now_ns(void) {
    struct timespec ts;
    clock_gettime(CLOCK_MONOTONIC, &ts);
    return (uint64_t)ts.tv_sec * 1000000000ull + (uint64_t)ts.tv_nsec;
}

/* Acquire on loads, release on stores, both on read-modify-write: whoever sees a
 * bit also sees what was written before the bit was set. */
static inline uint64_t sf_load(const uint64_t *p) { return __atomic_load_n(p, __ATOMIC_ACQUIRE); }
static inline void sf_store(uint64_t *p, uint64_t v) { __atomic_store_n(p, v, __ATOMIC_RELEASE); }
static inline uint64_t sf_fetch_or(uint64_t *p, uint64_t v) { return __atomic_fetch_or(p, v, __ATOMIC_ACQ_REL); }
static inline uint64_t sf_fetch_add(uint64_t *p, uint64_t v) { return __atomic_fetch_add(p, v, __ATOMIC_ACQ_REL); }
static inline uint64_t sf_exchange(uint64_t *p, uint64_t v) { return __atomic_exchange_n(p, v, __ATOMIC_ACQ_REL); }
/* Sequentially consistent pair for the phase switch: the fault thread stores `serving`
 * (or `reading`) then loads `phase`, the job stores `phase` then loads those. With anything weaker
 * both could read the old value, and a fault would be handled under the old phase
 * after the switch was reported complete. */
static inline uint64_t sf_load_sc(const uint64_t *p) { return __atomic_load_n(p, __ATOMIC_SEQ_CST); }
static inline void sf_store_sc(uint64_t *p, uint64_t v) { __atomic_store_n(p, v, __ATOMIC_SEQ_CST); }

static inline int sf_ctz(uint64_t v) { return __builtin_ctzll(v); }
static inline int sf_popcount(uint64_t v) { return __builtin_popcountll(v); }
static inline int sf_log2(uint64_t v) { return 63 - __builtin_clzll(v | 1); }

/* Returns 0, or -errno. EAGAIN: an event (remove, unmap) is pending and must be read
 * first; only the fault thread reads it, so everybody else tries again or leaves it be. */
static inline int sf_writeprotect(int uffd, uint64_t hva, uint64_t length, int on) {
    struct sf_uffd_writeprotect wp = {{hva, length}, on ? 1u : 0u};
    return ioctl(uffd, SF_UFFDIO_WRITEPROTECT, &wp) == 0 ? 0 : -errno;
}
static inline int sf_wake(int uffd, uint64_t hva, uint64_t length) {
    struct sf_uffd_range range = {hva, length};
    return ioctl(uffd, SF_UFFDIO_WAKE, &range) == 0 ? 0 : -errno;
}
static inline int sf_unregister(int uffd, uint64_t hva, uint64_t length) {
    struct sf_uffd_range range = {hva, length};
    return ioctl(uffd, SF_UFFDIO_UNREGISTER, &range) == 0 ? 0 : -errno;
}

static inline long sf_read_process(int pid, void *to, uint64_t hva, uint64_t length) {
    struct iovec local = {to, length};
    struct iovec remote = {(void *)(uintptr_t)hva, length};
    long n = syscall(SYS_process_vm_readv, pid, &local, 1ul, &remote, 1ul, 0ul);
    return n < 0 ? -errno : n;
}
static inline long sf_pread(int fd, void *to, uint64_t length, uint64_t offset) {
    ssize_t n = pread(fd, to, length, (off_t)offset);
    return n < 0 ? -errno : n;
}

/* How many pages of a range of a shmem file are there, swapped out or not: cachestat(2).
 * -errno for kernels before 6.5. */
static inline int64_t sf_pages_there(int fd, uint64_t offset, uint64_t length) {
    uint64_t range[2] = {offset, length};
    uint64_t counts[5] = {0}; /* in cache, dirty, in writeback, evicted, recently evicted */
    if (syscall(451, fd, range, counts, 0u) != 0)
        return -errno;
    return (int64_t)(counts[0] + counts[3]);
}

/* Whether a range of a shmem file has a hole now. SEEK_HOLE, where cachestat is not to be had,
 * may walk the whole file. */
static inline int sf_has_hole(int fd, uint64_t offset, uint64_t length) {
    int64_t pages = sf_pages_there(fd, offset, length);
    if (pages >= 0)
        return (uint64_t)pages < length / 4096;
    off_t hole = lseek(fd, (off_t)offset, SEEK_HOLE);
    return hole >= 0 && (uint64_t)hole < offset + length;
}

static inline void sf_futex_wait(uint32_t *word, uint32_t expected, long timeout_ns) {
    struct timespec ts = {0, timeout_ns};
    syscall(SYS_futex, word, FUTEX_WAIT_PRIVATE, expected, &ts, NULL, 0);
}
static inline void sf_futex_wake(uint32_t *word) {
    syscall(SYS_futex, word, FUTEX_WAKE_PRIVATE, 1, NULL, NULL, 0);
}
static inline void sf_bump(uint32_t *word) { __atomic_fetch_add(word, 1u, __ATOMIC_ACQ_REL); }
static inline uint32_t sf_word(const uint32_t *word) { return __atomic_load_n(word, __ATOMIC_ACQUIRE); }

/* The fault thread waits so, and never by sched_yield: where it has real-time priority, that
 * would not let the thread run for which it waits. */
static inline void sf_wait_briefly(uint64_t tries) {
    struct timespec ts = {0, 5000};
    if (tries < 64)
        __builtin_ia32_pause();
    else
        nanosleep(&ts, NULL);
}

static inline int sf_is_zero(const uint8_t *page, uint64_t length) {
    const uint64_t *p = (const uint64_t *)page;
    uint64_t words = length / 8;
    /* Most data pages differ early; look there before the long scan. */
    if (p[0] | p[words / 2] | p[words - 1]) return 0;
    for (uint64_t i = 0; i < words; i += 8) {
        if (p[i] | p[i + 1] | p[i + 2] | p[i + 3] | p[i + 4] | p[i + 5] | p[i + 6] | p[i + 7]) return 0;
    }
    return 1;
}

static inline void sf_put_be64(uint8_t *p, uint64_t v) { v = __builtin_bswap64(v); memcpy(p, &v, 8); }
static inline void sf_put_be32(uint8_t *p, uint32_t v) { v = __builtin_bswap32(v); memcpy(p, &v, 4); }

static inline void *sf_map_populated(uint64_t length) {
    void *p = mmap(NULL, length, PROT_READ | PROT_WRITE,
                   MAP_PRIVATE | MAP_ANONYMOUS | MAP_POPULATE | MAP_NORESERVE, -1, 0);
    return p == MAP_FAILED ? NULL : p;
}
#endif
