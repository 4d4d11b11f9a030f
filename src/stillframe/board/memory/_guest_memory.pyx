# cython: language_level=3, boundscheck=False, wraparound=False, cdivision=True, initializedcheck=False
# cython: freethreading_compatible=True
"""Copies to and from guest RAM of this process, without the GIL.

A write may wait for the fault thread, which may wait for workers that need the GIL; so nobody
who holds it writes guest RAM (docs/design/board.md). Nothing is checked here: ``guest_ram`` does.
"""

from cpython.bytes cimport PyBytes_AS_STRING, PyBytes_FromStringAndSize
from libc.stdint cimport int64_t, uint8_t, uint64_t
from libc.string cimport memcpy

cdef extern from "_guest_memory_sys.h" nogil:
    int64_t sf_map_guest(int fd, uint64_t length)
    int sf_unmap_guest(uint64_t hva, uint64_t length)
    int sf_punch(int fd, uint64_t offset, uint64_t length)
    void sf_touch(uint64_t hva, uint64_t length)
    int sf_place(int uffd, uint64_t hva, const uint8_t *data, uint64_t length)
    int64_t sf_read_into(int fd, uint64_t hva, uint64_t length, int64_t file_offset)


def map_shared(int fd, uint64_t length_bytes):
    """Map a memfd MAP_SHARED, not for forked children; its address, or -errno."""
    return sf_map_guest(fd, length_bytes)

def unmap(uint64_t hva, uint64_t length_bytes):
    """munmap(2); 0 or -errno."""
    return sf_unmap_guest(hva, length_bytes)

def copy_out(uint64_t hva, uint64_t length_bytes):
    cdef bytes copy = PyBytes_FromStringAndSize(NULL, length_bytes)
    cdef char *to = PyBytes_AS_STRING(copy)
    with nogil:
        memcpy(to, <const void *>hva, length_bytes)
    return copy

def copy_in(uint64_t hva, const uint8_t[::1] data not None):
    cdef uint64_t length = data.shape[0]
    if length == 0:
        return
    with nogil:
        memcpy(<void *>hva, &data[0], length)

def punch(int fd, uint64_t offset_bytes, uint64_t length_bytes):
    """Make a hole in a memfd (fallocate(2)); 0 or -errno."""
    cdef int rc
    with nogil:
        rc = sf_punch(fd, offset_bytes, length_bytes)
    return rc

def touch(uint64_t hva, uint64_t length_bytes):
    """Write to each page without changing it, so that its protection is served."""
    with nogil:
        sf_touch(hva, length_bytes)

def read_into(int fd, uint64_t hva, uint64_t length_bytes, int64_t file_offset):
    """read(2) (``file_offset`` -1) or pread(2) into guest RAM; the bytes, or -errno.

    Pages that the kernel may not write to (EFAULT) are touched, then it tries again.
    """
    cdef int64_t got
    with nogil:
        got = sf_read_into(fd, hva, length_bytes, file_offset)
    return got

def place(int uffd, uint64_t hva, const uint8_t[::1] data not None):
    """Fill missing pages (UFFDIO_COPY); those that are there stay. 0 or -errno."""
    cdef uint64_t length = data.shape[0]
    cdef int rc
    if length == 0:
        return 0
    with nogil:
        rc = sf_place(uffd, hva, &data[0], length)
    return rc

def place_zeroes(int uffd, uint64_t hva, uint64_t length_bytes):
    """Fill missing pages with zeroes (UFFDIO_ZEROPAGE); 0 or -errno."""
    cdef int rc
    with nogil:
        rc = sf_place(uffd, hva, NULL, length_bytes)
    return rc
