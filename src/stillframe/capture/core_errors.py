"""Our errors for the native core's error numbers."""

from __future__ import annotations

import errno
import os

from stillframe.capture import _capture
from stillframe.errors import HostError, InternalError, MachineError, SnapshotFailed

LOST = {
    _capture.LOST_REMOVED: "RAM was dropped (balloon or free page reporting)",
    _capture.LOST_UNMAPPED: "RAM was unmapped (hot-unplug or resize)",
    _capture.LOST_HOLE: "RAM was punched out of its file (balloon or virtio-mem)",
}


def check_result(result: int, doing: str) -> int:
    """Return the result, unless it is a negative error number.

    Raises:
        MachineError: the VM exited. HostError: no memory. InternalError: any other error.
    """
    if result >= 0:
        return result
    number = -result
    if number in (errno.ESRCH, errno.EFAULT, errno.EIO, errno.ENOENT):
        raise MachineError(
            f"{doing} failed",
            why="the VM exited, or a part of its RAM was removed",
            guest_state="unknown",
        )
    if number == errno.ENOMEM:
        raise HostError(f"{doing} failed", why="the host is out of memory", guest_state="running")
    raise InternalError(f"{doing} failed", why=os.strerror(number), guest_state="running")


def lost_error(kind: int, what: str) -> SnapshotFailed:
    """Make the error for RAM that was lost before it was copied.

    Args:
        kind: a key of :data:`LOST`. what: the RAM, in words.
    """
    return SnapshotFailed(
        "the snapshot would not show one instant",
        why=f"{LOST[kind]}: {what}",
        remedy="take another one, with the balloon and memory hotplug at rest",
        guest_state="running",
    )


def no_memory(needed_bytes: int) -> HostError:
    """Make the error for lack of memory for copies."""
    return HostError(
        "no memory for copies of guest RAM",
        why=f"the host gives less than {needed_bytes >> 20} MiB",
        remedy="free memory on the host, or look at its overcommit settings",
        guest_state="running",
    )
