"""Private copies of raw disks; they share blocks with the disk where the file system can."""

from __future__ import annotations

import errno
import fcntl
import os
import stat

from stillframe.errors import HostError, NotFoundError
from stillframe.restore.show import printable

_FICLONE = 0x40049409
_STEP_BYTES = 64 << 20


def copy_disk(source: str, copy: str) -> None:
    """Make ``copy``, mode 0600, with the content of ``source``; holes stay holes.

    Where the file system can (btrfs, XFS, ...), both share their blocks until one is written to
    (ioctl_ficlone(2)); otherwise all data is copied.

    Raises:
        NotFoundError: there is no such disk. HostError: it cannot be read, or the copy not made.
    """
    try:
        read = os.open(source, os.O_RDONLY | os.O_CLOEXEC | os.O_NONBLOCK)
    except OSError as error:
        if error.errno == errno.ENOENT:
            raise NotFoundError(f"there is no disk {printable(source)}") from error
        raise _failure(source, error) from error
    try:
        if not stat.S_ISREG(os.fstat(read).st_mode):
            raise HostError(
                f"cannot copy the disk {printable(source)}",
                why="it is not a regular file",
                remedy="give the disk yourself: -- --disk FILE",
            )
        write = os.open(copy, os.O_RDWR | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o600)
        try:
            _copy(read, write)
        finally:
            os.close(write)
    except OSError as error:
        raise _failure(source, error) from error
    finally:
        os.close(read)


def _copy(read: int, write: int) -> None:
    try:
        fcntl.ioctl(write, _FICLONE, read)
        return
    except OSError:
        length_bytes = os.fstat(read).st_size  # another file system, or one that cannot share
    os.ftruncate(write, length_bytes)
    at = 0
    while at < length_bytes:
        try:
            at = os.lseek(read, at, os.SEEK_DATA)
        except OSError as error:
            if error.errno == errno.ENXIO:
                return  # nothing but a hole up to the end
            raise
        end = min(length_bytes, os.lseek(read, at, os.SEEK_HOLE))
        os.lseek(write, at, os.SEEK_SET)
        while at < end and (done := os.sendfile(write, read, at, min(_STEP_BYTES, end - at))):
            at += done
        if at < end:
            return  # the disk was truncated meanwhile


def _failure(source: str, error: OSError) -> HostError:
    return HostError(f"cannot copy the disk {printable(source)}", why=error.strerror)
