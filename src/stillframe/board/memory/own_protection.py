"""Write protection of this process's own RAM, by the best means that this host allows.

That is a full userfaultfd where permitted; else one that serves faults in user mode only, which
ordinary users may have (``vm.unprivileged_userfaultfd`` of the kernel's sysctl documentation);
else, as in containers that refuse userfaultfd(2), mprotect(2) and a SIGSEGV handler.
This module finds out by trying, never from a version.
"""

from __future__ import annotations

from typing import Literal

from stillframe.capture.signal_protection import SignalProtection
from stillframe.capture.write_protection import WriteProtection
from stillframe.errors import HostError
from stillframe.kernel.userfaultfd import own_userfaultfd

Preference = Literal["auto", "userfaultfd", "mprotect"]
"""How RAM is write-protected; ``auto`` takes what the host allows."""


def open_own_protection(prefer: Preference = "auto") -> WriteProtection:
    """Open the write protection of this process's RAM for one capture.

    Args:
        prefer: ``auto`` takes a userfaultfd where one is permitted and has the features, else
            ``mprotect``; the other values are requirements.

    Raises:
        HostError: the required means is not available here; the message says why.
    """
    if prefer == "mprotect":
        return SignalProtection()
    try:
        return own_userfaultfd()
    except HostError:
        if prefer == "userfaultfd":
            raise
        return SignalProtection()
