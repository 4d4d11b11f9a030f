/* Pages of a shmem file that stay what they are, also once they are punched out of it: registered
 * buffers of an io_uring hold them (FOLL_LONGTERM), and need no mapping.
 * Source: Linux io_uring/rsrc.c: io_sqe_buffer_register; io_uring_register(2). */
#ifndef STILLFRAME_PINS_H
#define STILLFRAME_PINS_H

#include <errno.h>
#include <fcntl.h>
#include <linux/io_uring.h>
#include <pthread.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <sys/syscall.h>
#include <sys/uio.h>
#include <unistd.h>

#define SF_PIN_PAGE 4096u

struct sf_pin_run { uint64_t offset, length; }; /* bytes within the block, ascending */

struct sf_pins {
    int ring, pipe[2];
    void *sq, *cq, *sqes;
    size_t sq_bytes, cq_bytes, sqes_bytes;
    struct io_uring_params params;
    pthread_mutex_t lock;
    uint64_t base; /* where the block was mapped */
    struct sf_pin_run *run;
    unsigned runs;
};

static inline void sf_pins_free(struct sf_pins *p) {
    if (!p) return;
    if (p->sq) munmap(p->sq, p->sq_bytes);
    if (p->cq) munmap(p->cq, p->cq_bytes);
    if (p->sqes) munmap(p->sqes, p->sqes_bytes);
    if (p->ring >= 0) close(p->ring); /* lets go of all pages */
    if (p->pipe[0] >= 0) { close(p->pipe[0]); close(p->pipe[1]); }
    pthread_mutex_destroy(&p->lock);
    free(p->run);
    free(p);
}

static inline void *sf_ring_map(int ring, size_t bytes, off_t which) {
    void *m = mmap(NULL, bytes, PROT_READ | PROT_WRITE, MAP_SHARED | MAP_POPULATE, ring, which);
    return m == MAP_FAILED ? NULL : m;
}

/* Pin runs of a file; all of them are populated. NULL: it cannot be had, errno says why. */
static inline struct sf_pins *sf_pins_new(int fd, uint64_t file_offset, uint64_t length,
                                          const struct sf_pin_run *run, unsigned runs) {
    struct sf_pins *p = calloc(1, sizeof *p);
    struct iovec *vectors = calloc(runs ? runs : 1, sizeof *vectors);
    void *map = MAP_FAILED;
    int error = ENOMEM;
    char again[32];
    if (!p) { free(vectors); errno = error; return NULL; }
    p->ring = p->pipe[0] = p->pipe[1] = -1;
    pthread_mutexattr_t kind;
    pthread_mutexattr_init(&kind);
    /* A worker of low priority may hold it while the fault thread waits. */
    pthread_mutexattr_setprotocol(&kind, PTHREAD_PRIO_INHERIT);
    pthread_mutex_init(&p->lock, &kind);
    pthread_mutexattr_destroy(&kind);
    p->run = calloc(runs ? runs : 1, sizeof *run);
    if (!vectors || !p->run) goto failed;
    memcpy(p->run, run, runs * sizeof *run);
    p->runs = runs;
    /* Writable, as the kernel wants it of what it may also read into: nobody does. */
    snprintf(again, sizeof again, "/proc/self/fd/%d", fd);
    int writable = open(again, O_RDWR | O_CLOEXEC);
    if (writable < 0) { error = errno; goto failed; }
    map = mmap(NULL, length, PROT_READ | PROT_WRITE, MAP_SHARED | MAP_NORESERVE, writable,
               (off_t)file_offset);
    close(writable);
    if (map == MAP_FAILED) { error = errno; goto failed; }
    p->base = (uint64_t)(uintptr_t)map;
    for (unsigned n = 0; n < runs; n++) {
        vectors[n].iov_base = (char *)map + run[n].offset;
        vectors[n].iov_len = run[n].length;
    }
    p->ring = (int)syscall(SYS_io_uring_setup, 4, &p->params);
    if (p->ring < 0) { error = errno; goto failed; }
    if (syscall(SYS_io_uring_register, p->ring, IORING_REGISTER_BUFFERS, vectors, runs) != 0 ||
        pipe2(p->pipe, O_CLOEXEC) != 0) { error = errno; goto failed; }
    p->sq_bytes = p->params.sq_off.array + p->params.sq_entries * sizeof(unsigned);
    p->cq_bytes = p->params.cq_off.cqes + p->params.cq_entries * sizeof(struct io_uring_cqe);
    p->sqes_bytes = p->params.sq_entries * sizeof(struct io_uring_sqe);
    p->sq = sf_ring_map(p->ring, p->sq_bytes, IORING_OFF_SQ_RING);
    p->cq = sf_ring_map(p->ring, p->cq_bytes, IORING_OFF_CQ_RING);
    p->sqes = sf_ring_map(p->ring, p->sqes_bytes, IORING_OFF_SQES);
    if (!p->sq || !p->cq || !p->sqes) goto failed;
    munmap(map, length);
    free(vectors);
    return p;
failed:
    if (map != MAP_FAILED) munmap(map, length);
    free(vectors);
    sf_pins_free(p);
    errno = error;
    return NULL;
}

static inline int sf_pin_run_of(const struct sf_pins *p, uint64_t offset) {
    int low = 0, high = (int)p->runs - 1;
    while (low <= high) {
        int middle = (low + high) / 2;
        const struct sf_pin_run *r = &p->run[middle];
        if (offset < r->offset) high = middle - 1;
        else if (offset >= r->offset + r->length) low = middle + 1;
        else return middle;
    }
    return -1;
}

/* Read one page as it was pinned: 0, 1 if it is not pinned, or -1. */
static inline int sf_pins_read(struct sf_pins *p, uint64_t offset, void *to) {
    int buffer = sf_pin_run_of(p, offset), done = -1;
    if (buffer < 0) return 1;
    pthread_mutex_lock(&p->lock);
    unsigned *tail = (unsigned *)((char *)p->sq + p->params.sq_off.tail);
    unsigned slot = *tail & (p->params.sq_entries - 1);
    struct io_uring_sqe *sqe = (struct io_uring_sqe *)p->sqes + slot;
    memset(sqe, 0, sizeof *sqe);
    sqe->opcode = IORING_OP_WRITE_FIXED;
    sqe->fd = p->pipe[1];
    sqe->addr = p->base + offset;
    sqe->len = SF_PIN_PAGE;
    sqe->off = ~0ull;
    sqe->buf_index = (uint16_t)buffer;
    ((unsigned *)((char *)p->sq + p->params.sq_off.array))[slot] = slot;
    __atomic_store_n(tail, *tail + 1, __ATOMIC_RELEASE);
    unsigned submit = 1;
    unsigned *head = (unsigned *)((char *)p->cq + p->params.cq_off.head);
    unsigned *end = (unsigned *)((char *)p->cq + p->params.cq_off.tail);
    while (__atomic_load_n(end, __ATOMIC_ACQUIRE) == *head) {
        long rc = syscall(SYS_io_uring_enter, p->ring, submit, 1, IORING_ENTER_GETEVENTS, NULL, 0);
        if (rc < 0 && errno != EINTR) break;
        if (rc > 0) submit = 0;
    }
    if (__atomic_load_n(end, __ATOMIC_ACQUIRE) != *head) {
        const struct io_uring_cqe *cqe = (const struct io_uring_cqe *)((char *)p->cq + p->params.cq_off.cqes) +
                                         (*head & (p->params.cq_entries - 1));
        int wrote = cqe->res;
        __atomic_store_n(head, *head + 1, __ATOMIC_RELEASE);
        if (wrote == (int)SF_PIN_PAGE && read(p->pipe[0], to, SF_PIN_PAGE) == (ssize_t)SF_PIN_PAGE)
            done = 0;
    }
    pthread_mutex_unlock(&p->lock);
    return done;
}
#endif
