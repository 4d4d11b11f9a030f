"""The interface of all kinds of write protection for guest RAM."""

from __future__ import annotations

from typing import Protocol

from stillframe.model import ProtectionKind


class WriteProtection(Protocol):
    """The write protection that a ``RamCapture`` uses and reads faults from.

    ``kind``: with ``userfaultfd`` the kernel's own writes wait like the guest's; with the other
    kinds a system call that writes to protected RAM fails with EFAULT.
    """

    @property
    def kind(self) -> ProtectionKind: ...

    def fileno(self) -> int:
        """Return the descriptor to read fault messages (``struct uffd_msg``) from."""

    def register(self, hva: int, length_bytes: int) -> None:
        """Register a range; nothing is protected yet. Raises BusyError, HostError."""

    def close(self) -> None:
        """Un-protect everything still registered, and wake waiting threads."""
