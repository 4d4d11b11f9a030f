/* System calls of the image's filler. Distribution headers are older than the kernel's.
 * Source: Linux include/uapi/linux/userfaultfd.h. */
#ifndef STILLFRAME_FILL_SYS_H
#define STILLFRAME_FILL_SYS_H

#include <errno.h>
#include <stdint.h>
#include <string.h>
#include <sys/ioctl.h>
#include <sys/mman.h>
#include <unistd.h>

#define SF_PAGE 4096ull

struct sf_message {
    uint8_t event;
    uint8_t reserved1;
    uint16_t reserved2;
    uint32_t reserved3;
    uint64_t flags;
    uint64_t address;
    uint64_t rest;
};
struct sf_range { uint64_t start, len; };
struct sf_copy { uint64_t dst, src, len, mode; int64_t copy; };

#define SF_WAKE _IOR(0xAA, 0x02, struct sf_range)
#define SF_COPY _IOWR(0xAA, 0x03, struct sf_copy)
#define SF_DONTWAKE 1ull

static const uint8_t sf_zero_page[4096] __attribute__((aligned(4096)));

static inline uint64_t sf_load(const uint64_t *p) { return __atomic_load_n(p, __ATOMIC_ACQUIRE); }
static inline uint64_t sf_fetch_or(uint64_t *p, uint64_t v) {
    return __atomic_fetch_or(p, v, __ATOMIC_ACQ_REL);
}
static inline uint64_t sf_fetch_and(uint64_t *p, uint64_t v) {
    return __atomic_fetch_and(p, v, __ATOMIC_ACQ_REL);
}

static inline int sf_wake(int uffd, uint64_t address, uint64_t length) {
    struct sf_range range = {address, length};
    return ioctl(uffd, SF_WAKE, &range) == 0 ? 0 : -errno;
}

/* Pages into the page cache under a shared mapping of ours: each gets there whole, or not at all.
 * They need no alignment. How many are there now, or -EEXIST if the first one was, or -errno. */
static inline int64_t sf_place(int uffd, uint64_t address, const uint8_t *pages, uint64_t count) {
    struct sf_copy copy = {address, (uint64_t)(uintptr_t)pages, count * SF_PAGE, SF_DONTWAKE, 0};
    for (;;) {
        if (ioctl(uffd, SF_COPY, &copy) == 0) return (int64_t)count;
        if (copy.copy > 0) return copy.copy / (int64_t)SF_PAGE;
        if (errno != EAGAIN) return -errno;
        copy.copy = 0; /* mappings of ours were changing */
    }
}

/* Whether the file has a page there, swapped out or not (lseek(2), SEEK_DATA). */
static inline int sf_is_there(int fd, uint64_t offset) {
    return lseek(fd, (off_t)offset, SEEK_DATA) == (off_t)offset;
}
static inline int64_t sf_seek(int fd, uint64_t offset, int data) {
    off_t at = lseek(fd, (off_t)offset, data ? SEEK_DATA : SEEK_HOLE);
    return at < 0 ? -(int64_t)errno : (int64_t)at;
}

static inline int64_t sf_map(int fd, uint64_t length) {
    void *at = mmap(NULL, length, PROT_READ | PROT_WRITE, MAP_SHARED | MAP_NORESERVE, fd, 0);
    if (at == MAP_FAILED) return -(int64_t)errno;
    madvise(at, length, MADV_DONTFORK);
    madvise(at, length, MADV_NOHUGEPAGE);
    return (int64_t)(uintptr_t)at;
}
static inline int sf_unmap(uint64_t at, uint64_t length) {
    return munmap((void *)(uintptr_t)at, length) == 0 ? 0 : -errno;
}

#endif
