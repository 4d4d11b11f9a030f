"""The kernel's userfaultfd interface, as far as write protection, missing and minor faults need it.

Distribution headers predate the features, so the numbers are defined here. Source: Linux
``include/uapi/linux/userfaultfd.h`` and ``Documentation/admin-guide/mm/userfaultfd.rst``.
"""

from __future__ import annotations

import struct

SYS_USERFAULTFD_X86_64 = 323

UFFD_API = 0xAA

UFFD_USER_MODE_ONLY = 1
"""Flag of userfaultfd(2): serve faults in user mode only, which needs no privilege (Linux 5.11)."""

FEATURE_PAGEFAULT_FLAG_WP = 1 << 0
FEATURE_EVENT_REMAP = 1 << 2
FEATURE_EVENT_REMOVE = 1 << 3
FEATURE_MISSING_SHMEM = 1 << 5
FEATURE_EVENT_UNMAP = 1 << 6
FEATURE_MINOR_HUGETLBFS = 1 << 9
FEATURE_WP_HUGETLBFS_SHMEM = 1 << 12
FEATURE_WP_UNPOPULATED = 1 << 13

FEATURE_NAMES = {
    FEATURE_PAGEFAULT_FLAG_WP: "UFFD_FEATURE_PAGEFAULT_FLAG_WP (Linux 5.7)",
    FEATURE_EVENT_REMAP: "UFFD_FEATURE_EVENT_REMAP (Linux 4.11)",
    FEATURE_EVENT_REMOVE: "UFFD_FEATURE_EVENT_REMOVE (Linux 4.11)",
    FEATURE_MISSING_SHMEM: "UFFD_FEATURE_MISSING_SHMEM (Linux 4.11)",
    FEATURE_EVENT_UNMAP: "UFFD_FEATURE_EVENT_UNMAP (Linux 4.11)",
    FEATURE_MINOR_HUGETLBFS: "UFFD_FEATURE_MINOR_HUGETLBFS (Linux 5.13)",
    FEATURE_WP_HUGETLBFS_SHMEM: "UFFD_FEATURE_WP_HUGETLBFS_SHMEM (Linux 5.19)",
    FEATURE_WP_UNPOPULATED: "UFFD_FEATURE_WP_UNPOPULATED (Linux 6.4)",
}
WRITE_PROTECT_FEATURES = sum(FEATURE_NAMES) - FEATURE_MISSING_SHMEM - FEATURE_MINOR_HUGETLBFS
MISSING_FEATURES = FEATURE_MISSING_SHMEM

REGISTER_MODE_MISSING = 1 << 0
REGISTER_MODE_WP = 1 << 1
REGISTER_MODE_MINOR = 1 << 2
IOCTL_BIT_WAKE = 1 << 2
IOCTL_BIT_COPY = 1 << 3
IOCTL_BIT_WRITEPROTECT = 1 << 6
IOCTL_BIT_CONTINUE = 1 << 7

API_STRUCT = struct.Struct("=QQQ")  # api, features, ioctls
REGISTER_STRUCT = struct.Struct("=QQQQ")  # start, len, mode, ioctls
RANGE_STRUCT = struct.Struct("=QQ")


def _ioc(direction: int, number: int, size: int) -> int:
    return direction << 30 | size << 16 | UFFD_API << 8 | number


UFFDIO_API = _ioc(3, 0x3F, API_STRUCT.size)
UFFDIO_REGISTER = _ioc(3, 0x00, REGISTER_STRUCT.size)
UFFDIO_UNREGISTER = _ioc(2, 0x01, RANGE_STRUCT.size)
USERFAULTFD_IOC_NEW = 0xAA00
"""On /dev/userfaultfd: makes a userfaultfd for the calling process (Linux 6.1)."""
