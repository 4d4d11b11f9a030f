"""A VM that maps an image, watched for missing pages."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Sequence

from stillframe.errors import HostError, MachineError, RefusedError, StillframeError
from stillframe.image import _fill
from stillframe.image.fill_record import ClonePlace
from stillframe.image.ram_image import ImageFiles
from stillframe.kernel.proc_maps import read_maps
from stillframe.kernel.remote_missing import close_there, watch_missing
from stillframe.kernel.userfaultfd import Userfaultfd
from stillframe.store.processes import start_ticks

_USERFAULTFD_LINK = "anon_inode:[userfaultfd]"


class Clone:
    """One VM of an image, until the image is complete.

    Args:
        uffd: the VM's userfaultfd, as our descriptor; owned from here on, as is ``pidfd``.
        number: the userfaultfd's descriptor in the VM.
        addresses: addresses of the image's blocks in the VM.
    """

    def __init__(
        self,
        image: ImageFiles,
        pid: int,
        pidfd: int,
        uffd: Userfaultfd,
        number: int,
        addresses: Sequence[int],
    ) -> None:
        self.pid = pid
        self.pidfd = pidfd
        self.uffd = uffd
        self.number = number
        self.addresses = tuple(addresses)
        self._lengths = tuple(block.used_length_bytes for block in image.blocks)
        self.waiting = _fill.Waiting(
            uffd.fileno(), pidfd, list(zip(image.pages, addresses, strict=True))
        )

    @property
    def place(self) -> ClonePlace:
        """What another process needs to find the clone."""
        return ClonePlace(
            pid=self.pid,
            started=start_ticks(self.pid),
            uffd=self.number,
            addresses=self.addresses,
        )

    def release(self) -> None:
        """Stop watching it: pages still missing read as zeroes. Never raises.

        This also closes the VM's own descriptor; if that is not permitted, the descriptor stays but
        has no effect.
        """
        for address, length_bytes in zip(self.addresses, self._lengths, strict=True):
            self.uffd.unregister(address, length_bytes)
        with contextlib.suppress(OSError, StillframeError):
            if is_userfaultfd(self.pid, self.number):
                close_there(self.pid, self.number)
        self.close()

    def close(self) -> None:
        """Close our descriptors; the VM's own descriptor keeps its RAM watched."""
        self.uffd.close()
        if self.pidfd >= 0:
            os.close(self.pidfd)
            self.pidfd = -1


def watch(image: ImageFiles, pid: int, gadgets: tuple[int, int] | None = None) -> Clone:
    """Watch a VM that maps an image and whose guest has not run yet.

    Args:
        gadgets: as for ``watch_missing``.

    Raises:
        RefusedError: it does not map the whole image, or a seccomp filter forbids it.
        HostError: a kernel feature or a permission is missing. BusyError: it is watched already.
        MachineError: the process is gone.
    """
    addresses = _addresses(image, pid)
    try:
        pidfd = os.pidfd_open(pid)
    except ProcessLookupError as error:
        raise MachineError(f"process {pid} is gone", guest_state="none") from error
    try:
        lengths = [block.used_length_bytes for block in image.blocks]
        ranges = list(zip(addresses, lengths, strict=True))
        uffd, number = watch_missing(pid, ranges, gadgets=gadgets, device=image.device_fd)
    except BaseException:
        os.close(pidfd)
        raise
    return Clone(image, pid, pidfd, uffd, number, addresses)


def _addresses(image: ImageFiles, pid: int) -> list[int]:
    found = {}
    for mapped in read_maps(pid).vmas:
        if mapped.offset_bytes == 0 and mapped.writable:
            found[mapped.device, mapped.inode] = mapped
    addresses: list[int] = []
    for fd, block in zip(image.fds, image.blocks, strict=True):
        status = os.fstat(fd)
        device = (os.major(status.st_dev), os.minor(status.st_dev))
        vma = found.get((device, status.st_ino))
        if vma is None or vma.length_bytes < block.used_length_bytes:
            raise RefusedError(
                f"the VM does not map the image of its RAM block {block.idstr!r} as one piece",
                remedy="restore with --stream",
                guest_state="none",
            )
        addresses.append(vma.start)
    return addresses


def is_userfaultfd(pid: int, number: int) -> bool:
    """Return whether that process's descriptor is a userfaultfd. Raises HostError: not
    permitted."""
    try:
        return os.readlink(f"/proc/{pid}/fd/{number}") == _USERFAULTFD_LINK  # noqa: PTH115
    except PermissionError as error:
        raise HostError(
            f"may not look at process {pid}", remedy="run as the VM's user, or as root"
        ) from error
    except OSError:
        return False
