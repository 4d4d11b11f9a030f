"""Whether a disk image is open for writing in some QEMU now.

QEMU marks what it does with an image by shared locks on single bytes (QEMU ``block/file-posix.c``:
RAW_LOCK_PERM_BASE and BLK_PERM_WRITE); asking for a lock there tells, without taking it.
"""

from __future__ import annotations

import fcntl
import os
import struct

_F_OFD_GETLK = 36
_PERM_WRITE_BYTE = 100 + 1
_FLOCK = struct.Struct("hhqqi4x")  # struct flock on 64-bit Linux


def is_written(path: str) -> bool:
    """Whether another program has the image open for writing, as far as may be seen."""
    try:
        fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC | os.O_NONBLOCK)
    except OSError:
        return False
    try:
        # A read lock asked for would not conflict with QEMU's own; a write lock does.
        wanted = _FLOCK.pack(fcntl.F_WRLCK, os.SEEK_SET, _PERM_WRITE_BYTE, 1, 0)
        answer = _FLOCK.unpack(fcntl.fcntl(fd, _F_OFD_GETLK, wanted))
        return bool(answer[0] != fcntl.F_UNLCK)
    except OSError:
        return False
    finally:
        os.close(fd)
