"""A watch on another process's memory for missing pages: the process waits for them even if we die.

The process makes the userfaultfd and, unlike in ``remote_attach``, keeps its own descriptor: the
kernel drops a userfaultfd with its last descriptor, and waiting threads would then read zeroes. The
next filler fetches it again (``fetch_fd``). Source: userfaultfd(2), madvise(2), Linux
``mm/shmem.c``; DESIGN section 7.
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
    """Make a userfaultfd of process ``pid`` for missing pages of ``ranges``; return it and its
    number there.

    The ranges are mappings of files in shared memory. From here on, a thread that touches a hole in
    them waits. Their previous content is dropped: the process's private copies by this call, the
    files' pages by the caller. No huge page is made over a hole. One thread of the process is
    stopped for about 3 ms.

    Args:
        ranges: (address, length in bytes) each.
        gadgets: the result of ``injection.find_gadgets``, if it was called before.
        device: our descriptor of /dev/userfaultfd, for a process that may not call userfaultfd(2).
            The process has it under the same number, or is lent it for the moment.

    Raises:
        HostError: a kernel feature or a permission is missing.
        RefusedError: a seccomp filter forbids it.
        BusyError: another userfaultfd watches a range. MachineError: the process is gone.
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
                # Register first, so that no page dropped below goes missing unwatched.
                uffd.register(address, length_bytes, IMAGE_PAGES)
                # A kernel without huge pages rejects this and does not need it.
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
    """Return what userfaultfd(2) would; only for VMs without privileges, on hosts that permit
    it."""
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
    """Make process ``pid`` close its descriptor ``number``.

    Raises:
        HostError, RefusedError: not permitted. MachineError: the process is gone.
    """

    def close() -> None:
        with RemoteSyscalls(pid) as remote:
            remote.refuse_unless_allowed({"close": (arch.SYS_CLOSE, ())})
            remote.call(arch.SYS_CLOSE, number)

    on_own_thread(close)
