"""Write protection of this process's own RAM, by whatever this host allows.

A full userfaultfd where that is permitted; else one that serves faults in user mode only, which
ordinary users may have (``vm.unprivileged_userfaultfd`` of the kernel's sysctl documentation);
else, as in containers that refuse userfaultfd(2), mprotect(2) and a SIGSEGV handler.
Found out by trying, never from a version.
"""

from __future__ import annotations

from typing import Literal, Protocol

from stillframe.errors import HostError
from stillframe.memory.signal_protection import SignalProtection
from stillframe.memory.userfaultfd import WRITE_PROTECTION, Use, Userfaultfd
from stillframe.model import ProtectionKind

Preference = Literal["auto", "userfaultfd", "mprotect"]


class WriteProtection(Protocol):
    """What a ``RamCapture`` protects RAM with, and reads faults from.

    ``kind``: with ``userfaultfd`` the kernel's own writes wait as the guest's do; with the others
    a system call that writes to protected RAM fails with EFAULT (see ``GuestRam.read_from``).
    """

    @property
    def kind(self) -> ProtectionKind: ...

    def fileno(self) -> int:
        """Where messages of faults (``struct uffd_msg``) are read."""

    def register(self, hva: int, length_bytes: int) -> None:
        """Take a range in; nothing is protected yet. Raises BusyError, HostError."""

    def close(self) -> None:
        """Un-protect all that is still registered, and wake whoever waits."""


def own_userfaultfd(use: Use = WRITE_PROTECTION) -> Userfaultfd:
    """A userfaultfd of this process, the best that is permitted, ready to register ranges.

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


def open_own_protection(prefer: Preference = "auto") -> WriteProtection:
    """The write protection of this process's RAM for one capture.

    Args:
        prefer: ``auto`` takes a userfaultfd where one is permitted and has the features, else
            ``mprotect``; the others are demands.

    Raises:
        HostError: what was demanded is not to be had here; the message says what is in the way.
    """
    if prefer == "mprotect":
        return SignalProtection()
    try:
        return own_userfaultfd()
    except HostError:
        if prefer == "userfaultfd":
            raise
        return SignalProtection()
