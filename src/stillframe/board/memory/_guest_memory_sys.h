/* System calls on guest RAM of this process. */
#ifndef STILLFRAME_GUEST_MEMORY_SYS_H
#define STILLFRAME_GUEST_MEMORY_SYS_H

#include <errno.h>
#include <fcntl.h>
#include <sched.h>
#include <stdint.h>
#include <sys/ioctl.h>
#include <sys/mman.h>
#include <unistd.h>

#define SF_PAGE 4096ull

/* Linux include/uapi/linux/userfaultfd.h */
struct sf_range { uint64_t start, len; };
struct sf_copy { uint64_t dst, src, len, mode; int64_t copied; };
struct sf_zeropage { struct sf_range range; uint64_t mode; int64_t filled; };
#define SF_IOCTL_WAKE     _IOR(0xAA, 0x02, struct sf_range)
#define SF_IOCTL_COPY     _IOWR(0xAA, 0x03, struct sf_copy)
#define SF_IOCTL_ZEROPAGE _IOWR(0xAA, 0x04, struct sf_zeropage)

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

/* Fill missing pages, with `data` or with zeroes (NULL), and wake who waits for them. Pages that
 * are there already stay as they are. 0 or -errno. */
static inline int sf_place(int uffd, uint64_t hva, const uint8_t *data, uint64_t length) {
    uint64_t at = 0;
    while (at < length) {
        struct sf_copy copy = {hva + at, (uint64_t)(uintptr_t)(data + at), length - at, 0, 0};
        struct sf_zeropage zero = {{hva + at, length - at}, 0, 0};
        if ((data ? ioctl(uffd, SF_IOCTL_COPY, &copy) : ioctl(uffd, SF_IOCTL_ZEROPAGE, &zero)) == 0)
            break;
        int64_t done = data ? copy.copied : zero.filled;
        if (done > 0) {
            at += (uint64_t)done; /* the kernel stops early before a page that is there */
        } else if (errno == EEXIST) {
            /* Somebody may have begun to wait before it came; nothing else wakes them. */
            struct sf_range page = {hva + at, SF_PAGE};
            ioctl(uffd, SF_IOCTL_WAKE, &page);
            at += SF_PAGE;
        } else if (errno == EAGAIN) {
            sched_yield(); /* the mappings are being changed */
        } else {
            return -errno;
        }
    }
    return 0;
}
#endif
