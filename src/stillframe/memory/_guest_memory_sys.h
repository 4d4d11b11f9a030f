/* System calls on guest RAM of this process. */
#ifndef STILLFRAME_GUEST_MEMORY_SYS_H
#define STILLFRAME_GUEST_MEMORY_SYS_H

#include <errno.h>
#include <fcntl.h>
#include <stdint.h>
#include <sys/mman.h>
#include <unistd.h>

#define SF_PAGE 4096ull

static inline int64_t sf_map_guest(int fd, uint64_t length) {
    void *p = mmap(NULL, length, PROT_READ | PROT_WRITE, MAP_SHARED | MAP_NORESERVE, fd, 0);
    if (p == MAP_FAILED)
        return -errno;
    /* A forked child inherits neither userfaultfd nor fault thread: its writes would pass
     * behind the protection, unseen. */
    if (madvise(p, length, MADV_DONTFORK) != 0) {
        int error = errno;
        munmap(p, length);
        return -error;
    }
    return (int64_t)(uintptr_t)p;
}
static inline int sf_unmap_guest(uint64_t hva, uint64_t length) {
    return munmap((void *)(uintptr_t)hva, length) == 0 ? 0 : -errno;
}

static inline int sf_punch(int fd, uint64_t offset, uint64_t length) {
    return fallocate(fd, FALLOC_FL_PUNCH_HOLE | FALLOC_FL_KEEP_SIZE, (off_t)offset, (off_t)length) == 0
               ? 0 : -errno;
}

/* One atomic addition of nothing a page: a write for the protection, and no change even when
 * a vCPU writes the same word at this moment. */
static inline void sf_touch(uint64_t hva, uint64_t length) {
    for (uint64_t at = hva & ~(SF_PAGE - 1); at < hva + length; at += SF_PAGE)
        (void)__atomic_fetch_add((uint32_t *)(uintptr_t)at, 0u, __ATOMIC_RELAXED);
}

/* With mprotect, and with a userfaultfd for user mode only, the kernel does not wait for a
 * page that it may not write to: it gives EFAULT, or stops short before the page. A page may
 * be protected again between touch and read (another round of tracking), so this may repeat. */
static inline int64_t sf_read_into(int fd, uint64_t hva, uint64_t length, int64_t file_offset) {
    uint64_t got = 0;
    while (got < length) {
        void *to = (void *)(uintptr_t)(hva + got);
        ssize_t n = file_offset < 0 ? read(fd, to, length - got)
                                    : pread(fd, to, length - got, (off_t)(file_offset + (int64_t)got));
        if (n < 0 && errno == EFAULT) {
            sf_touch(hva + got, length - got);
            continue;
        }
        if (n < 0)
            return got ? (int64_t)got : -errno;
        got += (uint64_t)n;
        if (n == 0 || file_offset < 0)
            break; /* the end of the file; or a stream, which gives what it has */
    }
    return (int64_t)got;
}
#endif
