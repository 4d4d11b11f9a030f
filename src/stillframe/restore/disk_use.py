"""Detection of disk images that some QEMU has open for writing.

QEMU marks its use of an image with shared locks on single bytes (QEMU ``block/file-posix.c``:
RAW_LOCK_PERM_BASE and BLK_PERM_WRITE). The kernel lists all locks, so the image is not opened:
opening can start a watchdog, or unblock the writer of a FIFO.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path

_PERM_WRITE_BYTE = 100 + 1


def is_written(path: str) -> bool:
    """Whether another program has the image open for writing, as far as visible."""
    return any(first <= _PERM_WRITE_BYTE <= last for first, last in _locks_on(path))


def is_open(path: str) -> bool:
    """Whether a QEMU has the image open, if only for reading, as far as visible."""
    return any(True for _ in _locks_on(path))


def _locks_on(path: str) -> Iterator[tuple[int, int]]:
    """Yield the first and last byte of each lock."""
    try:
        status = os.stat(path)  # noqa: PTH116 - a path that cannot be read is no error here
        locks = Path("/proc/locks").read_text()
    except (OSError, ValueError):
        return
    for line in locks.splitlines():
        fields = line.split()
        if _is_lock_on(fields, status):
            yield int(fields[6]), 1 << 63 if fields[7] == "EOF" else int(fields[7])


def _is_lock_on(fields: list[str], status: os.stat_result) -> bool:
    """Whether this line of proc_locks(5) is a lock on the file, such as
    ``1: OFDLCK ADVISORY READ -1 08:01:1234 101 101``."""
    if len(fields) != 8 or fields[1] != "OFDLCK":
        return False
    major, minor, inode = fields[5].split(":")
    device = os.makedev(int(major, 16), int(minor, 16))
    # btrfs and overlayfs show another device number than stat(2); its major number is 0 as well.
    same = device == status.st_dev or int(major, 16) == os.major(status.st_dev) == 0
    return same and int(inode) == status.st_ino
