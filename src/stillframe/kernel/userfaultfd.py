"""A userfaultfd that this process holds: handshake, registration of ranges, closing.

Source: Linux ``Documentation/admin-guide/mm/userfaultfd.rst`` (write-protect notifications).
"""

from __future__ import annotations

import contextlib
import ctypes
import errno
import fcntl
import os
from typing import Literal, NamedTuple

from stillframe.errors import BusyError, HostError
from stillframe.kernel import uffd_abi as abi


class Use(NamedTuple):
    """A purpose of a userfaultfd: what it needs of the kernel, and the wording of its errors."""

    features: int
    mode: int
    ioctl_bit: int
    ioctl_name: str
    purpose: str
    done: str
    newer_kernel: str
    file_backed: str
    instead: str


WRITE_PROTECTION = Use(
    features=abi.WRITE_PROTECT_FEATURES,
    mode=abi.REGISTER_MODE_WP,
    ioctl_bit=abi.IOCTL_BIT_WRITEPROTECT,
    ioctl_name="UFFDIO_WRITEPROTECT",
    purpose="write-protect a VM's RAM in the background",
    done="write-protected",
    newer_kernel="use Linux 6.4 or newer, or --mode stop",
    file_backed="it may be file-backed: use --mode stop",
    instead="use --mode stop",
)
MISSING_PAGES = Use(
    features=abi.MISSING_FEATURES,
    mode=abi.REGISTER_MODE_MISSING,
    ioctl_bit=abi.IOCTL_BIT_COPY,
    ioctl_name="UFFDIO_COPY",
    purpose="fill a VM's RAM on demand",
    done="filled on demand",
    newer_kernel="use Linux 4.11 or newer, or migrate without postcopy",
    file_backed="migrate without postcopy",
    instead="migrate without postcopy",
)
HELD_PAGES = Use(
    features=abi.FEATURE_MINOR_HUGETLBFS,
    mode=abi.REGISTER_MODE_MINOR,
    ioctl_bit=abi.IOCTL_BIT_CONTINUE,
    ioctl_name="UFFDIO_CONTINUE",
    purpose="see which huge pages of a VM are there",
    done="looked at page by page",
    newer_kernel="use --mode stop",
    file_backed="use --mode stop",
    instead="use --mode stop",
)
IMAGE_PAGES = Use(
    features=abi.MISSING_FEATURES,
    mode=abi.REGISTER_MODE_MISSING,
    ioctl_bit=abi.IOCTL_BIT_WAKE,
    ioctl_name="UFFDIO_WAKE",
    purpose="fill a VM's RAM while it runs",
    done="filled while the VM runs",
    newer_kernel="use Linux 4.11 or newer, or restore with --stream",
    file_backed="restore with --stream",
    instead="restore with --stream",
)


class Userfaultfd:
    """Owner of one userfaultfd, of this process or another.

    The descriptor is close-on-exec and never inherited: when this process dies, the kernel releases
    it, un-protects all of its ranges and wakes every waiter (invariant 4).
    """

    def __init__(
        self, fd: int, kind: Literal["userfaultfd", "userfaultfd-user"] = "userfaultfd"
    ) -> None:
        """Own ``fd`` from here on; ``userfaultfd-user``: it serves faults in user mode only."""
        self._fd = fd
        self.kind = kind
        os.set_inheritable(fd, False)
        self.features = 0

    @classmethod
    def for_this_process(cls, *, user_mode_only: bool = False) -> Userfaultfd:
        """Make one for our own address space, by userfaultfd(2).

        Args:
            user_mode_only: make the unprivileged kind: system calls that write to a protected page
                fail with EFAULT.

        Raises:
            HostError: the kernel has no userfaultfd, or does not permit it.
        """
        flags = os.O_CLOEXEC | os.O_NONBLOCK | (abi.UFFD_USER_MODE_ONLY if user_mode_only else 0)
        libc = ctypes.CDLL(None, use_errno=True)
        fd = libc.syscall(abi.SYS_USERFAULTFD_X86_64, flags)
        if fd < 0:
            raise host_error_for(ctypes.get_errno())
        return cls(fd, "userfaultfd-user" if user_mode_only else "userfaultfd")

    @classmethod
    def from_device(cls) -> Userfaultfd:
        """Make one for our own address space from /dev/userfaultfd (Linux 6.1), which is permitted
        by file mode instead of capability.

        Raises:
            HostError: the device cannot be opened, or makes none.
        """
        try:
            device = os.open("/dev/userfaultfd", os.O_RDWR | os.O_CLOEXEC)
            try:
                flags = os.O_CLOEXEC | os.O_NONBLOCK
                return cls(fcntl.ioctl(device, abi.USERFAULTFD_IOC_NEW, flags))
            finally:
                os.close(device)
        except OSError as error:
            raise host_error_for(error.errno or errno.EPERM) from error

    def fileno(self) -> int:
        return self._fd

    def handshake(self, use: Use = WRITE_PROTECTION) -> None:
        """Request the features that ``use`` needs (UFFDIO_API).

        Raises:
            HostError: one is missing; the message names it and the kernel that introduced it.
        """
        argument = bytearray(abi.API_STRUCT.pack(abi.UFFD_API, use.features, 0))
        try:
            fcntl.ioctl(self._fd, abi.UFFDIO_API, argument)
        except OSError as error:
            missing = self._missing_features(use) if error.errno == errno.EINVAL else str(error)
            raise HostError(
                f"this kernel cannot {use.purpose}",
                why=f"it lacks {missing}",
                remedy=use.newer_kernel,
                guest_state="running",
            ) from error
        self.features = abi.API_STRUCT.unpack(argument)[1]

    def _missing_features(self, use: Use) -> str:
        # A failed UFFDIO_API leaves the descriptor unusable and names no feature; a query without
        # features returns all that the kernel has.
        argument = bytearray(abi.API_STRUCT.pack(abi.UFFD_API, 0, 0))
        try:
            fcntl.ioctl(self._fd, abi.UFFDIO_API, argument)
        except OSError as error:
            return f"userfaultfd features ({error})"
        lacking = use.features & ~abi.API_STRUCT.unpack(argument)[1]
        return ", ".join(name for bit, name in abi.FEATURE_NAMES.items() if lacking & bit)

    def register(self, hva: int, length_bytes: int, use: Use = WRITE_PROTECTION) -> None:
        """Register a range; nothing is protected yet.

        Raises:
            BusyError: the range is registered with another userfaultfd.
            HostError: this kind of memory does not support it.
        """
        argument = bytearray(abi.REGISTER_STRUCT.pack(hva, length_bytes, use.mode, 0))
        try:
            fcntl.ioctl(self._fd, abi.UFFDIO_REGISTER, argument)
        except OSError as error:
            if error.errno == errno.EBUSY:
                raise BusyError(
                    "guest RAM is watched by another userfaultfd",
                    why="another snapshot, a postcopy migration, or the filling of its image"
                    " is under way",
                    remedy="wait for it to end",
                    guest_state="running",
                ) from error
            raise HostError(
                f"guest RAM at {hva:#x} cannot be {use.done}",
                why=os.strerror(error.errno or 0),
                remedy=use.file_backed,
                guest_state="running",
            ) from error
        if not abi.REGISTER_STRUCT.unpack(argument)[3] & use.ioctl_bit:
            raise HostError(
                f"guest RAM at {hva:#x} cannot be {use.done}",
                why=f"the kernel offers no {use.ioctl_name} for it",
                remedy=use.instead,
                guest_state="running",
            )

    def unregister(self, hva: int, length_bytes: int) -> None:
        """Unregister a range, and wake its waiters. It is no error if the memory is gone, and the
        range with it."""
        with contextlib.suppress(OSError):
            fcntl.ioctl(self._fd, abi.UFFDIO_UNREGISTER, abi.RANGE_STRUCT.pack(hva, length_bytes))

    def close(self) -> None:
        """Close it: the kernel un-protects all registered ranges and wakes their waiters."""
        if self._fd >= 0:
            os.close(self._fd)
            self._fd = -1

    def __enter__(self) -> Userfaultfd:
        return self

    def __exit__(self, *_error: object) -> None:
        self.close()


def own_userfaultfd(use: Use = WRITE_PROTECTION) -> Userfaultfd:
    """Make the best permitted userfaultfd of this process, ready to register ranges.

    Raises:
        HostError: none is permitted, or the kernel lacks it or a feature.
    """
    uffd = _permitted_userfaultfd()
    try:
        uffd.handshake(use)
    except HostError:
        uffd.close()
        raise
    return uffd


def _permitted_userfaultfd() -> Userfaultfd:
    makers = (
        Userfaultfd.for_this_process,
        Userfaultfd.from_device,
        lambda: Userfaultfd.for_this_process(user_mode_only=True),
    )
    refusals = []
    for make in makers:
        try:
            return make()
        except HostError as error:
            refusals.append(error)
    raise refusals[0]


def host_error_for(number: int) -> HostError:
    """Return the error for a userfaultfd(2) that failed with errno ``number``."""
    if number == errno.ENOSYS:
        return HostError(
            "this kernel has no userfaultfd",
            remedy="use a kernel with CONFIG_USERFAULTFD, or --mode stop",
        )
    return HostError(
        "userfaultfd is not allowed here",
        why=os.strerror(number),
        remedy="run as root, or set vm.unprivileged_userfaultfd=1",
    )
