"""A userfaultfd made in another process and brought here.

The process creates it, ``pidfd_getfd`` fetches it, and the process closes its own copy before
anything is registered. So only this process holds it, and the kernel un-protects everything when
this process dies. Source: pidfd_getfd(2), userfaultfd(2); DESIGN section 5.
"""

from __future__ import annotations

import ctypes
import errno
import os
import threading
from collections.abc import Callable
from typing import TypeVar

from stillframe.errors import HostError, MachineError, StillframeError
from stillframe.kernel import arch_x86_64 as arch
from stillframe.kernel.injection import RemoteSyscalls
from stillframe.kernel.uffd_abi import UFFD_USER_MODE_ONLY, USERFAULTFD_IOC_NEW
from stillframe.kernel.userfaultfd import Userfaultfd, host_error_for

_SYS_PIDFD_GETFD = 438
_FLAGS = os.O_CLOEXEC | os.O_NONBLOCK

LendDevice = Callable[[int], tuple[int, Callable[[], None]]]
"""Lends the process a descriptor of ours; returns its number there and how to take it back."""


def attach(
    pid: int, *, lend_device: LendDevice | None = None, user_mode_only_ok: bool = False
) -> Userfaultfd:
    """Make a userfaultfd of process ``pid``, ready to register ranges of its memory.

    Takes about 3 ms, in which one thread of the process is stopped; its vCPUs run.

    Args:
        lend_device: for processes without CAP_SYS_PTRACE, which may not call userfaultfd(2): lends
            them our open /dev/userfaultfd.
        user_mode_only_ok: the process tolerates EFAULT from its own system calls that write to
            protected memory. So if nothing else is permitted, make a userfaultfd for faults in user
            mode, which needs no privilege. Never for a VMM whose kernel side (KVM, vhost, read into
            guest RAM) writes guest memory.

    Raises:
        HostError: a kernel feature or a permission is missing.
        RefusedError: a seccomp filter forbids it.
        MachineError: the process is gone.
    """
    try:
        uffd = _make(pid, lend_device)
    except _NotPermitted as refused:
        if not user_mode_only_ok:
            raise refused.error from None
        uffd = _make_for_user_mode(pid)
    try:
        uffd.handshake()
    except BaseException:
        uffd.close()
        raise
    return uffd


class _NotPermitted(Exception):  # noqa: N818 - never leaves this module
    def __init__(self, error: StillframeError) -> None:
        self.error = error


def _make(pid: int, lend_device: LendDevice | None) -> Userfaultfd:
    try:
        return on_own_thread(lambda: _create(pid, arch.SYS_USERFAULTFD, (_FLAGS,)))
    except _NotPermitted as refused:
        if lend_device is None:
            raise
        return _through_device(pid, lend_device, refused)


def _make_for_user_mode(pid: int) -> Userfaultfd:
    flags = _FLAGS | UFFD_USER_MODE_ONLY
    try:
        uffd = on_own_thread(lambda: _create(pid, arch.SYS_USERFAULTFD, (flags,)))
    except _NotPermitted as refused:
        raise refused.error from None
    uffd.kind = "userfaultfd-user"
    return uffd


def _through_device(pid: int, lend_device: LendDevice, first: _NotPermitted) -> Userfaultfd:
    try:
        device = os.open("/dev/userfaultfd", os.O_RDWR | os.O_CLOEXEC)
    except OSError:
        raise first from None
    try:
        number, take_back = lend_device(device)
        try:
            return on_own_thread(
                lambda: _create(pid, arch.SYS_IOCTL, (number, USERFAULTFD_IOC_NEW, _FLAGS))
            )
        finally:
            take_back()
    finally:
        os.close(device)


Result = TypeVar("Result")


def on_own_thread(create: Callable[[], Result]) -> Result:
    """Call ``create`` in a thread of its own: ptrace is bound to the calling thread, and the kernel
    detaches when that thread ends, in whatever way."""
    result: list[Result] = []
    failure: list[BaseException] = []

    def run() -> None:
        try:
            result.append(create())
        except BaseException as error:  # noqa: BLE001 - handed to the caller below
            failure.append(error)

    thread = threading.Thread(target=run, name="stillframe-attach")
    thread.start()
    thread.join()
    if failure:
        raise failure[0]
    return result[0]


def _create(pid: int, call: int, arguments: tuple[int, ...]) -> Userfaultfd:
    try:
        pidfd = os.pidfd_open(pid)
    except ProcessLookupError as error:
        raise MachineError(f"process {pid} is gone", guest_state="none") from error
    try:
        with RemoteSyscalls(pid) as remote:
            name = "userfaultfd" if call == arch.SYS_USERFAULTFD else "ioctl"
            remote.refuse_unless_allowed(
                {
                    name: (call, arguments),
                    "close": (arch.SYS_CLOSE, ()),
                    "rt_sigreturn": (arch.SYS_RT_SIGRETURN, ()),
                }
            )
            theirs = remote.call(call, *arguments)
            if theirs < 0:
                failure = host_error_for(-theirs)
                failure.guest_state = "running"
                if -theirs in (errno.EPERM, errno.EACCES):
                    raise _NotPermitted(failure)
                raise failure
            try:
                ours = fetch_fd(pidfd, theirs)
            finally:
                closed = remote.call(arch.SYS_CLOSE, theirs)
            uffd = Userfaultfd(ours)
            if closed < 0:
                uffd.close()
                raise MachineError(
                    "the VM did not close its copy of the userfaultfd",
                    why=os.strerror(-closed),
                    guest_state="running",
                )
            return uffd
    finally:
        os.close(pidfd)


def fetch_fd(pidfd: int, number: int) -> int:
    """Return a copy of another process's descriptor (pidfd_getfd(2)).

    Raises:
        HostError: not permitted, or the process has no such descriptor.
    """
    libc = ctypes.CDLL(None, use_errno=True)
    fd = int(libc.syscall(_SYS_PIDFD_GETFD, pidfd, number, 0))
    if fd < 0:
        raise HostError(
            "a descriptor of the VM cannot be fetched",
            why=os.strerror(ctypes.get_errno()),
            remedy="pidfd_getfd needs Linux 5.6 and the right to trace the VM: run as root",
            guest_state="running",
        )
    return fd
