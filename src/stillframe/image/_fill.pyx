# cython: language_level=3, boundscheck=False, wraparound=False, cdivision=True, initializedcheck=False
# cython: freethreading_compatible=True
"""What must not wait for the GIL while a VM waits for a page: reading faults, placing pages.

Which pages are there is known to the kernel (the file's holes); ``there`` is our memory of it.
Source of the kernel's side: Documentation/admin-guide/mm/userfaultfd.rst.
"""

from libc.errno cimport EAGAIN, EEXIST, EINTR, ENOSPC, ENXIO, errno
from libc.stdint cimport int64_t, uint8_t, uint32_t, uint64_t
from libc.stdlib cimport calloc, free
from libc.string cimport memcpy

cdef extern from "<poll.h>" nogil:
    struct pollfd:
        int fd
        short events
        short revents
    int poll(pollfd *fds, unsigned long n, int timeout)
    short POLLIN

cdef extern from "<unistd.h>" nogil:
    ssize_t read(int fd, void *buf, size_t count)

cdef extern from "<sys/uio.h>" nogil:
    struct iovec:
        void *iov_base
        size_t iov_len
    ssize_t pwritev(int fd, const iovec *iov, int iovcnt, int64_t offset)

cdef extern from "_fill_sys.h" nogil:
    struct sf_message:
        uint8_t event
        uint64_t flags, address
    const uint8_t sf_zero_page[4096]
    uint64_t sf_load(const uint64_t *p)
    uint64_t sf_fetch_or(uint64_t *p, uint64_t v)
    uint64_t sf_fetch_and(uint64_t *p, uint64_t v)
    int sf_wake(int uffd, uint64_t address, uint64_t length)
    int64_t sf_place(int uffd, uint64_t address, const uint8_t *pages, uint64_t count)
    int sf_is_there(int fd, uint64_t offset)
    int64_t sf_seek(int fd, uint64_t offset, int data)
    int64_t sf_map(int fd, uint64_t length)
    int sf_unmap(uint64_t at, uint64_t length)

cdef enum:
    PAGE = 4096
    EVENT_PAGEFAULT = 0x12
    MESSAGES = 64
    MOST_CLONES = 512
    ZEROES = 16             # zero pages placed at once: a guest that clears memory goes on
    GATHERED = 16           # pages of one system call; they stay in the processor's cache
    WRITTEN = 512           # pages of one pwritev(2); IOV_MAX is 1024


def map_file(int fd, uint64_t length_bytes):
    """Map a file MAP_SHARED, without huge pages and not for children; its address, or -errno."""
    return sf_map(fd, length_bytes)

def unmap(uint64_t address, uint64_t length_bytes):
    """munmap(2); 0 or -errno."""
    return sf_unmap(address, length_bytes)

def wake(int uffd, uint64_t address, uint64_t length_bytes):
    """UFFDIO_WAKE; 0 or -errno."""
    return sf_wake(uffd, address, length_bytes)


cdef int _write_pages(int fd, uint64_t first, uint64_t count, const uint8_t *content,
                      uint64_t stride) noexcept nogil:
    cdef iovec parts[WRITTEN]
    cdef uint64_t page = 0, held, within = 0
    cdef ssize_t wrote
    while page < count:
        held = 0
        while held < WRITTEN and page + held < count:
            parts[held].iov_base = <void *>(content + (page + held) * stride)
            parts[held].iov_len = PAGE
            held += 1
        # A short write may end within a page.
        parts[0].iov_base = <void *>(content + page * stride + within)
        parts[0].iov_len = PAGE - within
        wrote = pwritev(fd, parts, <int>held, <int64_t>((first + page) * PAGE + within))
        if wrote < 0:
            if errno == EINTR:
                continue
            return -errno
        if wrote == 0:
            return -ENOSPC
        within += <uint64_t>wrote
        page += within // PAGE
        within %= PAGE
    return 0


def write_pages(int fd, uint64_t first_page, uint64_t pages, const uint8_t[::1] content,
                uint64_t start, uint64_t stride):
    """pwritev(2) of pages whose contents lie ``stride`` bytes apart; 0 or -errno."""
    cdef int rc
    if pages == 0:
        return 0
    if start + (pages - 1) * stride + PAGE > <uint64_t>content.shape[0]:
        raise ValueError("pages beyond the end")
    with nogil:
        rc = _write_pages(fd, first_page, pages, &content[start], stride)
    return rc


cdef struct Wanted:
    int clone
    int block
    int failure             # 0, or the -errno of a zero page
    uint64_t page

cdef struct Block:
    int fd
    int uffd                # ours, of our own mapping of the file
    uint64_t address        # of that mapping
    uint64_t pages
    uint64_t *data          # pages that are not full of zeroes, so their frame is needed
    uint64_t *there         # pages that are in the file; a hole made since is not seen


cdef inline bint _has(const uint64_t *bits, uint64_t page) noexcept nogil:
    return (sf_load(&bits[page >> 6]) >> (page & 63)) & 1


cdef void _mark(Block *block, uint64_t page) noexcept nogil:
    sf_fetch_or(&block.there[page >> 6], <uint64_t>1 << (page & 63))


cdef int _place(Block *block, uint64_t page, const uint8_t *content) noexcept nogil:
    """0, -EEXIST or -errno."""
    cdef int64_t rc
    if _has(block.there, page):
        return -EEXIST
    rc = sf_place(block.uffd, block.address + page * PAGE, content, 1)
    if rc == 1 or rc == -EEXIST:
        _mark(block, page)
    return 0 if rc == 1 else <int>rc


cdef int64_t _place_run(Block *block, uint64_t first, uint64_t count, const uint8_t *content,
                        uint64_t stride) noexcept nogil:
    """How many were not there yet, or -errno."""
    cdef uint8_t gathered[GATHERED * PAGE]
    cdef uint64_t page = first, end = first + count, number, held
    cdef int64_t rc, placed = 0
    while page < end:
        held = 0
        while held < GATHERED and page + held < end and not _has(block.there, page + held):
            memcpy(gathered + held * PAGE, content + (page + held - first) * stride, PAGE)
            held += 1
        if held == 0:
            page += 1
            continue
        rc = sf_place(block.uffd, block.address + page * PAGE, gathered, held)
        if rc == -EEXIST:
            _mark(block, page)
            page += 1
        elif rc < 0:
            return rc
        else:
            for number in range(page, page + <uint64_t>rc):
                _mark(block, number)
            page += <uint64_t>rc
            placed += rc
    return placed


cdef int _ready(Block *block, uint64_t page) noexcept nogil:
    """Whether a page is in the file now: 1; or its frame is needed: 0; or -errno."""
    cdef uint64_t number
    cdef int rc
    if _has(block.there, page):
        if sf_is_there(block.fd, page * PAGE):
            return 1
        # The guest gave it back since (balloon), so what it finds there are zeroes.
        rc = <int>sf_place(block.uffd, block.address + page * PAGE, sf_zero_page, 1)
        return 1 if rc == 1 or rc == -EEXIST else rc
    if _has(block.data, page):
        return 0
    rc = _place(block, page, sf_zero_page)
    if rc != 0 and rc != -EEXIST:
        return rc
    for number in range(page + 1, min(page + ZEROES, block.pages)):
        if _has(block.data, number) or _place(block, number, sf_zero_page) != 0:
            break
    return 1


cdef class Pages:
    """The pages of one RAM block's file: which hold data, and which are there.

    Args:
        uffd: our own, registered for missing pages of our mapping of the file at ``address``.
    """

    cdef Block _block

    def __cinit__(self, int fd, int uffd, uint64_t address, uint64_t pages):
        self._block.fd, self._block.uffd = fd, uffd
        self._block.address, self._block.pages = address, pages
        self._block.data = <uint64_t *>calloc((pages + 63) // 64, 8)
        self._block.there = <uint64_t *>calloc((pages + 63) // 64, 8)
        if self._block.data == NULL or self._block.there == NULL:
            raise MemoryError

    def __dealloc__(self):
        free(self._block.data)
        free(self._block.there)

    @property
    def count(self):
        """How many the block has."""
        return self._block.pages

    def mark_data(self, const uint64_t[::1] first_page, const uint32_t[::1] pages,
                  const uint8_t[::1] kind):
        """Runs of the index; those of kind 1 are not full of zeroes."""
        cdef Py_ssize_t row
        cdef uint64_t page
        with nogil:
            for row in range(first_page.shape[0]):
                if kind[row] == 1:
                    for page in range(first_page[row],
                                      min(first_page[row] + pages[row], self._block.pages)):
                        self._block.data[page >> 6] |= <uint64_t>1 << (page & 63)

    def mark_zero(self, uint64_t first_page, uint64_t pages):
        """These turned out to be full of zeroes."""
        cdef uint64_t page
        with nogil:
            for page in range(first_page, min(first_page + pages, self._block.pages)):
                if _has(self._block.data, page):
                    sf_fetch_and(&self._block.data[page >> 6], ~(<uint64_t>1 << (page & 63)))

    def lacks(self, uint64_t page):
        """Whether a page holds data, and is not there yet."""
        return page < self._block.pages and _has(self._block.data, page) \
            and not _has(self._block.there, page)

    def scan(self):
        """Learn from the file which pages are there; how many are, or -errno."""
        cdef int64_t at = 0, end = 0, page, found = 0
        cdef int64_t length = self._block.pages * PAGE
        with nogil:
            while at < length:
                at = sf_seek(self._block.fd, at, 1)
                if at < 0:
                    break
                end = sf_seek(self._block.fd, at, 0)
                if end < 0:
                    at = end
                    break
                for page in range(at // PAGE, min(end // PAGE, <int64_t>self._block.pages)):
                    sf_fetch_or(&self._block.there[page >> 6], <uint64_t>1 << (page & 63))
                    found += 1
                at = end
        return at if at < 0 and at != -ENXIO else found

    def all_there(self, uint64_t first_page, uint64_t pages):
        """Whether all of these pages are there."""
        cdef uint64_t page
        for page in range(first_page, min(first_page + pages, self._block.pages)):
            if not _has(self._block.there, page):
                return False
        return True

    def place(self, uint64_t first_page, uint64_t pages, const uint8_t[::1] content, uint64_t start,
              uint64_t stride):
        """Put pages into the file whose contents lie ``stride`` bytes apart; wakes nobody.

        Returns how many were not there yet, or -errno (those placed so far are there).
        """
        cdef int64_t placed
        if pages == 0:
            return 0
        if start + (pages - 1) * stride + PAGE > <uint64_t>content.shape[0] \
                or first_page + pages > self._block.pages:
            raise ValueError("pages beyond the end")
        with nogil:
            placed = _place_run(&self._block, first_page, pages, &content[start], stride)
        return placed


cdef class Waiting:
    """The faults of one clone.

    Args:
        uffd: the clone's. pidfd: readable once the clone has ended.
        blocks: (Pages, address in the clone) of each block, in the order of the image.
    """

    cdef readonly int uffd, pidfd
    cdef readonly list blocks
    cdef readonly uint64_t faults
    cdef readonly bint ended
    cdef Block **_blocks
    cdef uint64_t *_bases
    cdef int _count

    def __cinit__(self, int uffd, int pidfd, list blocks):
        cdef int number
        cdef Pages pages
        self.uffd, self.pidfd, self.blocks, self._count = uffd, pidfd, blocks, len(blocks)
        self._blocks = <Block **>calloc(len(blocks) + 1, sizeof(Block *))
        self._bases = <uint64_t *>calloc(len(blocks) + 1, 8)
        if self._blocks == NULL or self._bases == NULL:
            raise MemoryError
        for number in range(len(blocks)):
            pages, self._bases[number] = blocks[number]
            self._blocks[number] = &pages._block

    def __dealloc__(self):
        free(self._blocks)
        free(self._bases)

    def wake(self, int block, uint64_t page, uint64_t pages=1):
        """Wake who waits for one of these pages; whose page is not there asks again. 0 or -errno.
        """
        return sf_wake(self.uffd, self._bases[block] + page * PAGE, pages * PAGE)

    def wake_all(self):
        """Wake all, so that faults which somebody else has read are told again; 0 or -errno."""
        cdef int number, rc, failure = 0
        for number in range(self._count):
            rc = sf_wake(self.uffd, self._bases[number], self._blocks[number].pages * PAGE)
            failure = rc if rc != 0 else failure
        return failure

    cdef int _serve(self, Wanted *wanted, int clone, int room) noexcept nogil:
        """Serve what needs no frame; how many faults went to ``wanted``, or -errno."""
        cdef sf_message messages[MESSAGES]
        cdef ssize_t got
        cdef int number, block, rc, count = 0
        cdef uint64_t address, page
        got = read(self.uffd, messages, min(MESSAGES, room) * sizeof(sf_message))
        if got < 0:
            return 0 if errno == EAGAIN or errno == EINTR else -errno
        for number in range(got // <ssize_t>sizeof(sf_message)):
            if messages[number].event != EVENT_PAGEFAULT:
                continue
            self.faults += 1
            address = messages[number].address & ~<uint64_t>(PAGE - 1)
            for block in range(self._count):
                if not self._bases[block] <= address \
                        < self._bases[block] + self._blocks[block].pages * PAGE:
                    continue
                page = (address - self._bases[block]) // PAGE
                rc = _ready(self._blocks[block], page)
                if rc == 1:
                    sf_wake(self.uffd, address, PAGE)
                else:
                    # Its frame is needed; or there is no memory, and a worker tries again.
                    wanted[count].block, wanted[count].page = block, page
                    wanted[count].clone, wanted[count].failure = clone, rc
                    count += 1
                break
        return count


def serve(list clones, int stop_fd, int timeout_ms):
    """Serve faults without the GIL until some need a frame, a clone ended, or ``stop_fd`` says so.

    Returns:
        (number of the clone, block, page, 0 or the -errno of a zero page) of each fault that is
        left to the caller; None once ``stop_fd`` is readable. ``Waiting.ended`` is set of clones
        that have ended.
    """
    cdef pollfd polled[2 * MOST_CLONES + 1]
    cdef Wanted wanted[MESSAGES]
    cdef void *waiting[MOST_CLONES]
    cdef int number, count = len(clones), got = 1, found, total = 0
    cdef bint news = False
    cdef Waiting clone
    if count > MOST_CLONES:
        raise ValueError("too many clones")
    for number in range(count):
        clone = clones[number]
        waiting[number] = <void *>clone
        polled[2 * number].fd = -1 if clone.ended else clone.uffd
        polled[2 * number + 1].fd = -1 if clone.ended else clone.pidfd
        polled[2 * number].events = polled[2 * number + 1].events = POLLIN
    polled[2 * count].fd, polled[2 * count].events = stop_fd, POLLIN
    with nogil:
        while got > 0 and total == 0 and not news:
            got = poll(polled, 2 * count + 1, timeout_ms)
            if got <= 0 or polled[2 * count].revents:
                break
            for number in range(count):
                found = 0
                if polled[2 * number].revents and total < MESSAGES:
                    found = (<Waiting>waiting[number])._serve(
                        wanted + total, number, MESSAGES - total)
                    total += max(found, 0)
                if found < 0 or polled[2 * number + 1].revents:
                    (<Waiting>waiting[number]).ended = news = True
    if got > 0 and polled[2 * count].revents:
        return None
    return [(wanted[number].clone, wanted[number].block, wanted[number].page,
             wanted[number].failure) for number in range(total)]
