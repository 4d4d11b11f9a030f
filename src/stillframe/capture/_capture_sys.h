/* System calls, atomics and byte scans that Cython cannot express.
 *
 * Locking discipline of the whole core, in one place (but for the SIGSEGV handler's, which is
 * at the head of _signal_faults.h):
 *   - page bitmaps (claim, done, noted, faulted, removed) are only touched with the
 *     atomic helpers below; `populated` and `fresh` belong to the job's thread while the
 *     phase is armed or hold, and are frozen while it is active; claim, done and faulted are
 *     taken back (a page is to be captured anew) by the job's thread, in the same phases,
 *     in which nobody else looks at them;
 *   - the two slab rings have one producer and one consumer side each; the
 *     workers' side is serialised by `worker_lock`, the fault thread takes no lock (but for a
 *     page that was dropped from its file before it was saved: see _pins.h); its
 *     slab under way is the job's thread's to hand on once the phase is armed again;
 *   - everything else is written by one thread and read by others as statistics.
 */
#ifndef STILLFRAME_CAPTURE_SYS_H
#define STILLFRAME_CAPTURE_SYS_H

#include <errno.h>
#include <fcntl.h>
#include <linux/futex.h>
#include <poll.h>
#include <sched.h>
#include <stdint.h>
#include <stdlib.h>
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
struct sf_uffd_continue { struct sf_uffd_range range; uint64_t mode; int64_t mapped; };

#define SF_UFFDIO_WAKE         _IOR(0xAA, 0x02, struct sf_uffd_range)
#define SF_UFFDIO_UNREGISTER   _IOR(0xAA, 0x01, struct sf_uffd_range)
#define SF_UFFDIO_WRITEPROTECT _IOWR(0xAA, 0x06, struct sf_uffd_writeprotect)
#define SF_UFFDIO_CONTINUE     _IOWR(0xAA, 0x07, struct sf_uffd_continue)

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
static inline uint64_t sf_fetch_and(uint64_t *p, uint64_t v) { return __atomic_fetch_and(p, v, __ATOMIC_ACQ_REL); }
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
 * first; only the fault thread reads it, so everybody else tries again or leaves it be.
 * The mode is UFFDIO_WRITEPROTECT_MODE_*: 1 protect, 0 un-protect and wake, 2 do not wake. */
static inline int sf_writeprotect(int uffd, uint64_t hva, uint64_t length, int mode) {
    struct sf_uffd_writeprotect wp = {{hva, length}, (uint64_t)mode};
    return ioctl(uffd, SF_UFFDIO_WRITEPROTECT, &wp) == 0 ? 0 : -errno;
}
/* Whether an event is on its way: asked before anything is read of the argument
 * (Linux fs/userfaultfd.c: userfaultfd_writeprotect). */
static inline int sf_event_pending(int uffd) {
    return ioctl(uffd, SF_UFFDIO_WRITEPROTECT, NULL) != 0 && errno == EAGAIN;
}
static inline int sf_wake(int uffd, uint64_t hva, uint64_t length) {
    struct sf_uffd_range range = {hva, length};
    return ioctl(uffd, SF_UFFDIO_WAKE, &range) == 0 ? 0 : -errno;
}
static inline int sf_unregister(int uffd, uint64_t hva, uint64_t length) {
    struct sf_uffd_range range = {hva, length};
    return ioctl(uffd, SF_UFFDIO_UNREGISTER, &range) == 0 ? 0 : -errno;
}

/* Map a page of a hugetlbfs file that is there, filling nothing: 0, or -errno; -EFAULT: a hole. */
static inline int sf_hold_page(int uffd, uint64_t address, uint64_t length) {
    struct sf_uffd_continue arg = {{address, length}, 1 /* wake nobody */, 0};
    return ioctl(uffd, SF_UFFDIO_CONTINUE, &arg) == 0 || errno == EEXIST ? 0 : -errno;
}
/* Whether it is still mapped: whoever punches it out of the file takes it out of all mappings. */
static inline int sf_is_held(uint64_t address) {
    unsigned char state = 0;
    return mincore((void *)(uintptr_t)address, 4096, &state) == 0 && (state & 1);
}

struct sf_drop { uint64_t start, end; };

/* What a sleeping thread is in madvise(2) with, if that drops RAM (proc_pid_syscall(5)). */
static inline int sf_drop_of(int task_fd, int32_t tid, struct sf_drop *drop) {
    char name[32], text[256], *at = text;
    int length = 0, fd;
    uint64_t arg[3];
    char digits[12];
    ssize_t got;
    do digits[length++] = (char)('0' + tid % 10); while ((tid /= 10) && length < 11);
    for (int n = 0; n < length; n++) name[n] = digits[length - 1 - n];
    memcpy(name + length, "/syscall", 9);
    fd = openat(task_fd, name, O_RDONLY | O_CLOEXEC);
    if (fd < 0) return 0;
    got = read(fd, text, sizeof text - 1);
    close(fd);
    if (got <= 0) return 0;
    text[got] = 0;
    if (strncmp(text, "28 ", 3) != 0) return 0; /* SYS_madvise */
    at += 3;
    for (int n = 0; n < 3; n++) arg[n] = strtoull(at, &at, 0);
    if (arg[2] != MADV_DONTNEED && arg[2] != MADV_REMOVE && arg[2] != MADV_FREE && arg[2] != 24)
        return 0; /* 24: MADV_DONTNEED_LOCKED */
    drop->start = arg[0];
    drop->end = arg[0] + arg[1];
    return 1;
}

struct sf_dirent64 {
    uint64_t inode;
    int64_t offset;
    uint16_t length;
    uint8_t type;
    char name[];
};

/* What threads are about to drop; how many ranges. `last_tid` is looked at first, and alone if
 * it is at it: who drops RAM holds the VMM's lock. */
static inline int sf_drops_begun(int task_fd, int32_t *last_tid, struct sf_drop *drops, int most) {
    char entries[4096] __attribute__((aligned(8)));
    int found = 0;
    if (*last_tid > 0 && sf_drop_of(task_fd, *last_tid, drops)) return 1;
    lseek(task_fd, 0, SEEK_SET);
    for (;;) {
        long got = syscall(SYS_getdents64, task_fd, entries, sizeof entries);
        if (got <= 0) return found;
        for (long at = 0; at < got && found < most;) {
            const struct sf_dirent64 *entry = (const void *)(entries + at);
            int32_t tid = (int32_t)strtol(entry->name, NULL, 10);
            at += entry->length;
            if (tid > 0 && sf_drop_of(task_fd, tid, &drops[found])) {
                *last_tid = tid;
                found++;
            }
        }
    }
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

/* How many pages of a range of a shmem file are in memory, and swapped out: cachestat(2).
 * -errno for kernels before 6.5. */
static inline int sf_count_pages(int fd, uint64_t offset, uint64_t length, uint64_t *in, uint64_t *swapped) {
    uint64_t range[2] = {offset, length};
    uint64_t counts[5] = {0}; /* in cache, dirty, in writeback, evicted, recently evicted */
    if (syscall(451, fd, range, counts, 0u) != 0)
        return -errno;
    *in = counts[0];
    *swapped = counts[3];
    return 0;
}
static inline int64_t sf_pages_there(int fd, uint64_t offset, uint64_t length) {
    uint64_t in, swapped;
    int rc = sf_count_pages(fd, offset, length, &in, &swapped);
    return rc < 0 ? rc : (int64_t)(in + swapped);
}
/* Whether all that is there of it is in memory. */
static inline int sf_is_in_memory(int fd, uint64_t offset, uint64_t length) {
    uint64_t in, swapped;
    return sf_count_pages(fd, offset, length, &in, &swapped) == 0 && swapped == 0;
}

/* A bit for each of at most 64 pages of a shmem file that is in swap, also if a copy is still in the
 * swap cache (for mincore(2) it would be in memory). None where the kernel does not tell. */
static inline uint64_t sf_file_in_swap(int fd, uint64_t offset, uint64_t pages) {
    uint64_t found = 0, in, swapped;
    if (sf_count_pages(fd, offset, pages * 4096, &in, &swapped) != 0 || swapped == 0) return 0;
    for (uint64_t i = 0; i < pages; i++)
        if (sf_count_pages(fd, offset + i * 4096, 4096, &in, &swapped) == 0 && swapped != 0)
            found |= 1ull << i;
    return found;
}
/* Whether an entry of a pagemap is of a page in swap, or just being migrated (pagemap.rst). Our own
 * protection of an empty page shows as protected (bit 57) and swap type 31 (SWP_PTE_MARKER) where types
 * are shown; the marker of a poisoned page is not protected. */
static inline int sf_is_swapped(uint64_t entry) {
    return !(entry >> 63) && (entry >> 62 & 1) && ((entry & 31) != 31 || !(entry >> 57 & 1));
}
/* A bit for each of at most 64 pages of a process that is in swap. */
static inline uint64_t sf_in_swap(int pagemap_fd, uint64_t hva, uint64_t pages) {
    uint64_t entry[64], found = 0;
    ssize_t got = pread(pagemap_fd, entry, pages * 8, (off_t)(hva / 4096 * 8));
    for (uint64_t i = 0; i < pages && got > 0 && i < (uint64_t)got / 8; i++)
        if (sf_is_swapped(entry[i])) found |= 1ull << i;
    return found;
}
/* The runs of a bitmap of pages from an address on, at most 32. */
static inline int sf_runs_of_pages(uint64_t address, uint64_t pages, struct iovec *run) {
    int runs = 0;
    while (pages) {
        int first = sf_ctz(pages);
        uint64_t rest = ~(pages >> first);
        int many = rest ? sf_ctz(rest) : 64;
        if (many > 64 - first) many = 64 - first;
        run[runs].iov_base = (void *)(uintptr_t)(address + (uint64_t)first * 4096);
        run[runs++].iov_len = (size_t)many * 4096;
        pages &= first + many < 64 ? ~0ull << (first + many) : 0;
    }
    return runs;
}
#define SF_PAGEOUT 21       /* MADV_PAGEOUT */
#define SF_POPULATE_READ 22 /* MADV_POPULATE_READ */
/* Reclaim pages of a file: only what is mapped can be, and only what we alone have mapped is. */
static inline void sf_swap_out_file(uint64_t address, uint64_t pages) {
    struct iovec run[32];
    int runs = sf_runs_of_pages(address, pages, run);
    for (int i = 0; i < runs; i++)
        if (madvise(run[i].iov_base, run[i].iov_len, SF_POPULATE_READ) == 0)
            madvise(run[i].iov_base, run[i].iov_len, SF_PAGEOUT);
}
/* Reclaim pages of a process: process_madvise(2). Without pages: whether that is permitted. */
static inline int64_t sf_swap_out_process(int pidfd, uint64_t hva, uint64_t pages) {
    struct iovec run[32];
    int runs = sf_runs_of_pages(hva, pages, run);
    long rc = syscall(440, pidfd, run, (unsigned long)runs, SF_PAGEOUT, 0u);
    return rc < 0 ? -errno : rc;
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

/* Map a file that is only looked at: its address, or NULL. No page of it is reserved. */
static inline void *sf_map_file(int fd, uint64_t length, uint64_t offset) {
    void *p = mmap(NULL, length, PROT_READ, MAP_SHARED | MAP_NORESERVE, fd, (off_t)offset);
    if (p == MAP_FAILED) return NULL;
    madvise(p, length, MADV_DONTFORK);
    return p;
}
static inline void sf_unmap_file(void *address, uint64_t length) {
    munmap(address, length);
}

/* Memory that is there already when the fault thread writes to it; NULL: there is none.
 * (MAP_POPULATE tells nobody when it fails; MADV_POPULATE_WRITE does, from Linux 5.14 on.) */
static inline void *sf_map_populated(uint64_t length) {
    void *p = mmap(NULL, length, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
    if (p == MAP_FAILED) return NULL;
    if (madvise(p, length, 23 /* MADV_POPULATE_WRITE */) != 0) {
        if (errno != EINVAL) {
            munmap(p, length);
            return NULL;
        }
        memset(p, 0, length);
    }
    return p;
}
#endif
