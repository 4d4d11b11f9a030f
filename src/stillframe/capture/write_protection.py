"""What guest RAM is write-protected with: the contract of all kinds."""

from __future__ import annotations

from typing import Protocol

from stillframe.model import ProtectionKind


class WriteProtection(Protocol):
    """What a ``RamCapture`` protects RAM with, and reads faults from.

    ``kind``: with ``userfaultfd`` the kernel's own writes wait as the guest's do; with the others
    a system call that writes to protected RAM fails with EFAULT.
    """

    @property
    def kind(self) -> ProtectionKind: ...

    def fileno(self) -> int:
        """Where messages of faults (``struct uffd_msg``) are read."""

    def register(self, hva: int, length_bytes: int) -> None:
        """Take a range in; nothing is protected yet. Raises BusyError, HostError."""

    def close(self) -> None:
        """Un-protect all that is still registered, and wake whoever waits."""
