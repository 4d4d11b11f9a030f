"""Attach to a VM's process: a userfaultfd of its memory, in our hands only."""

from __future__ import annotations

import contextlib
from collections.abc import Callable

from stillframe.errors import MachineError
from stillframe.memory.remote_attach import attach
from stillframe.memory.userfaultfd import Userfaultfd
from stillframe.qmp.client import QmpClient


def open_userfaultfd(pid: int, qmp: QmpClient) -> Userfaultfd:
    """Make one in the process and bring it here; one of its threads stands still for about 3 ms.

    A QEMU without privileges may not call userfaultfd(2); it is lent our /dev/userfaultfd by
    ``add-fd`` instead.

    Raises:
        HostError, RefusedError, MachineError: as ``memory.remote_attach.attach``; the guest
            runs on.
    """

    def lend(fd: int) -> tuple[int, Callable[[], None]]:
        added = qmp.add_fd(fd)

        def take_back() -> None:
            with contextlib.suppress(MachineError):
                qmp.remove_fd(added)

        return added.fd, take_back

    return attach(pid, lend_device=lend if qmp.passes_fds else None)
