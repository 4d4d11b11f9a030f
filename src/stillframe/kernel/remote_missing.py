"""Watch another process's memory for missing pages, so that it waits whoever dies.

The process makes the userfaultfd and, unlike with ``remote_attach``, keeps its own descriptor: the
kernel drops a userfaultfd with its last one, and what waits would then find zeroes. Whoever goes
on filling fetches it again (``fetch_fd``).
Source: userfaultfd(2), madvise(2), Linux ``mm/shmem.c``; DESIGN section 7.
"""

from __future__ import annotations

import contextlib
import errno
import os
from collections.abc import Sequence

from stillframe.errors import HostError, MachineError, StillframeError
from stillframe.kernel import arch_x86_64 as arch
from stillframe.kernel.injection import RemoteSyscalls
from stillframe.kernel.lending import lend
from stillframe.kernel.remote_attach import fetch_fd, on_own_thread
from stillframe.kernel.uffd_abi import USERFAULTFD_IOC_NEW
from stillframe.kernel.userfaultfd import IMAGE_PAGES, Userfaultfd, host_error_for

_MADV_DONTNEED, _MADV_NOHUGEPAGE = 4, 15
_FLAGS = os.O_CLOEXEC | os.O_NONBLOCK


def watch_missing(
    pid: int,
    ranges: Sequence[tuple[int, int]],
    *,
    gadgets: tuple[int, int] | None = None,
    device: int | None = None,
) -> tuple[Userfaultfd, int]:
    """A userfaultfd of process ``pid`` for missing pages of ``ranges``, and its number there.

    The ranges are mappings of files in shared memory. From here on whoever touches a hole of them
    waits. What the process had in them before is dropped: its private copies by this call, the
    files' pages by the caller. No huge page is made over a hole. One thread of the process stands
    still for about 3 ms.

    Args:
        ranges: (address, length in bytes) each.
        gadgets: of ``injection.find_gadgets``, where there was time for it before.
        device: our descriptor of /dev/userfaultfd, for a process that may not call
            userfaultfd(2). It has it under the same number, or is lent it for the moment.

    Raises:
        HostError: a kernel feature or a permission is missing.
        RefusedError: a seccomp filter forbids it.
        BusyError: a range is watched by another userfaultfd. MachineError: the process is gone.
    """
    try:
        pidfd = os.pidfd_open(pid)
    except ProcessLookupError as error:
        raise MachineError(f"process {pid} is gone", guest_state="none") from error
    try:
        return on_own_thread(lambda: _watch(pid, pidfd, ranges, gadgets, device))
    finally:
        os.close(pidfd)


def _watch(
    pid: int,
    pidfd: int,
    ranges: Sequence[tuple[int, int]],
    gadgets: tuple[int, int] | None,
    device: int | None,
) -> tuple[Userfaultfd, int]:
    with RemoteSyscalls(pid, gadgets) as remote:
        remote.refuse_unless_allowed(
            {
                "userfaultfd": (arch.SYS_USERFAULTFD, (_FLAGS,)),
                "madvise": (arch.SYS_MADVISE, ()),
                "close": (arch.SYS_CLOSE, ()),
                "rt_sigreturn": (arch.SYS_RT_SIGRETURN, ()),
            }
        )
        theirs = remote.call(arch.SYS_USERFAULTFD, _FLAGS)
        if theirs == -errno.EPERM and device is not None:
            theirs = _through_device(remote, pid, pidfd, device)
        if theirs < 0:
            raise host_error_for(-theirs)
        uffd: Userfaultfd | None = None
        try:
            uffd = Userfaultfd(fetch_fd(pidfd, theirs))
            uffd.handshake(IMAGE_PAGES)
            for address, length_bytes in ranges:
                # Registered first, so that nothing can be missing unseen after the drop.
                uffd.register(address, length_bytes, IMAGE_PAGES)
                # A kernel without huge pages does not know it, and needs it not.
                remote.call(arch.SYS_MADVISE, address, length_bytes, _MADV_NOHUGEPAGE)
                dropped = remote.call(arch.SYS_MADVISE, address, length_bytes, _MADV_DONTNEED)
                if dropped < 0:
                    raise HostError(
                        "the VM's memory cannot be emptied before it is filled",
                        why=os.strerror(-dropped),
                        remedy="restore with --stream",
                    )
        except BaseException:
            if uffd is not None:
                uffd.close()
            with contextlib.suppress(StillframeError):  # the process may be gone
                remote.call(arch.SYS_CLOSE, theirs)
            raise
    return uffd, theirs


def _through_device(remote: RemoteSyscalls, pid: int, pidfd: int, device: int) -> int:
    """What userfaultfd(2) returns; only for VMs without privileges, where it is permitted."""
    inherited = _is_same(pid, device)
    number = device if inherited else lend(remote, pidfd, device)
    try:
        new = (number, USERFAULTFD_IOC_NEW, _FLAGS)
        remote.refuse_unless_allowed({"ioctl": (arch.SYS_IOCTL, new)})
        return remote.call(arch.SYS_IOCTL, *new)
    finally:
        if not inherited:
            remote.call(arch.SYS_CLOSE, number)


def _is_same(pid: int, device: int) -> bool:
    try:
        theirs = os.stat(f"/proc/{pid}/fd/{device}")  # noqa: PTH116
    except OSError:
        return False
    return theirs.st_rdev == os.fstat(device).st_rdev != 0


def close_there(pid: int, number: int) -> None:
    """Let process ``pid`` close its descriptor ``number``.

    Raises:
        HostError, RefusedError: not permitted. MachineError: the process is gone.
    """

    def close() -> None:
        with RemoteSyscalls(pid) as remote:
            remote.refuse_unless_allowed({"close": (arch.SYS_CLOSE, ())})
            remote.call(arch.SYS_CLOSE, number)

    on_own_thread(close)
