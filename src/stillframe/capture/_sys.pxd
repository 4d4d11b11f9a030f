"""What the core needs of C and the kernel; the system calls themselves are in ``_capture_sys.h``."""

from libc.stdint cimport int32_t, int64_t, uint8_t, uint32_t, uint64_t

cdef extern from "<assert.h>" nogil:
    void sf_assert "assert" (bint condition)    # in a debug build only (NDEBUG)

cdef extern from "<poll.h>" nogil:
    struct pollfd:
        int fd
        short events
        short revents
    int poll(pollfd *fds, unsigned long n, int timeout)
    short POLLIN, POLLERR, POLLHUP, POLLNVAL

cdef extern from "<errno.h>" nogil:
    int errno
    int EAGAIN, EINTR, EFAULT, ENOMEM, ENOENT, EIO, ESRCH

cdef extern from "<unistd.h>" nogil:
    ssize_t read(int fd, void *buf, size_t count)

cdef extern from "<sys/mman.h>" nogil:
    int munmap(void *p, size_t length)

cdef extern from "<sched.h>" nogil:
    int sched_yield()

cdef extern from "<pthread.h>" nogil:
    ctypedef struct pthread_mutex_t:
        pass
    int pthread_mutex_init(pthread_mutex_t *m, void *attr)
    int pthread_mutex_lock(pthread_mutex_t *m)
    int pthread_mutex_unlock(pthread_mutex_t *m)
    int pthread_mutex_destroy(pthread_mutex_t *m)

cdef extern from "_pins.h" nogil:
    struct sf_pin_run:
        uint64_t offset, length
    struct sf_pins:
        pass
    sf_pins *sf_pins_new(int fd, uint64_t file_offset, uint64_t length, const sf_pin_run *run, unsigned runs)
    int sf_pins_read(sf_pins *pins, uint64_t offset, void *to)
    void sf_pins_free(sf_pins *pins)

cdef extern from "_capture_sys.h" nogil:
    struct sf_uffd_msg:
        uint8_t event
        uint64_t arg0, arg1, arg2
    struct sf_drop:
        uint64_t start, end
    uint64_t sf_now_ns()
    uint64_t sf_load(const uint64_t *p)
    void sf_store(uint64_t *p, uint64_t v)
    uint64_t sf_fetch_or(uint64_t *p, uint64_t v)
    uint64_t sf_fetch_and(uint64_t *p, uint64_t v)
    uint64_t sf_fetch_add(uint64_t *p, uint64_t v)
    uint64_t sf_exchange(uint64_t *p, uint64_t v)
    uint64_t sf_load_sc(const uint64_t *p)
    void sf_store_sc(uint64_t *p, uint64_t v)
    int sf_ctz(uint64_t v)
    int sf_popcount(uint64_t v)
    int sf_log2(uint64_t v)
    int sf_writeprotect(int uffd, uint64_t hva, uint64_t length, int mode)
    int sf_event_pending(int uffd)
    int sf_wake(int uffd, uint64_t hva, uint64_t length)
    int sf_unregister(int uffd, uint64_t hva, uint64_t length)
    int sf_hold_page(int uffd, uint64_t address, uint64_t length)
    int sf_is_held(uint64_t address)
    int sf_is_in_memory(int fd, uint64_t offset, uint64_t length)
    uint64_t sf_file_in_swap(int fd, uint64_t offset, uint64_t pages)
    int sf_is_swapped(uint64_t entry)
    uint64_t sf_in_swap(int pagemap_fd, uint64_t hva, uint64_t pages)
    void sf_swap_out_file(uint64_t address, uint64_t wanted)
    int64_t sf_swap_out_process(int pidfd, uint64_t hva, uint64_t wanted)
    int sf_drops_begun(int task_fd, int32_t *last_tid, sf_drop *drops, int most)
    int64_t sf_read_process(int pid, void *to, uint64_t hva, uint64_t length)
    int64_t sf_pread(int fd, void *to, uint64_t length, uint64_t offset)
    void sf_futex_wait(uint32_t *word, uint32_t expected, long timeout_ns)
    void sf_futex_wake(uint32_t *word)
    void sf_bump(uint32_t *word)
    uint32_t sf_word(const uint32_t *word)
    void sf_wait_briefly(uint64_t tries)
    int64_t sf_pages_there(int fd, uint64_t offset, uint64_t length)
    int sf_has_hole(int fd, uint64_t offset, uint64_t length)
    int sf_is_zero(const uint8_t *page, uint64_t length)
    void sf_put_be64(uint8_t *p, uint64_t v)
    void sf_put_be32(uint8_t *p, uint32_t v)
    void *sf_map_file(int fd, uint64_t length, uint64_t offset)
    void sf_unmap_file(void *address, uint64_t length)
    void *sf_map_populated(uint64_t length)

cdef extern from "_signal_faults.h" nogil:
    int sf_signal_protect(uint64_t hva, uint64_t length, int on)
    void sf_signal_wake(uint64_t hva, uint64_t length)
    int sf_signal_register(uint64_t hva, uint64_t length, int fd)
    int sf_signal_release(int fd)
    int sf_signal_prepare_thread()
