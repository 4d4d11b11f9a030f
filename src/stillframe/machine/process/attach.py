"""Attachment to a VM's process: a userfaultfd of its memory that only we hold."""

from __future__ import annotations

import contextlib
import errno
import os
from collections.abc import Callable
from pathlib import Path

from stillframe.errors import HostError, MachineError, RefusedError, StillframeError
from stillframe.kernel.proc_maps import proc_error
from stillframe.kernel.ptrace import refuse_tracer
from stillframe.kernel.remote_attach import attach
from stillframe.kernel.userfaultfd import Userfaultfd, host_error_for
from stillframe.machine.process.vm_info import may_trace_anybody
from stillframe.qmp.client import QmpClient

_DEVICE = "/dev/userfaultfd"
_FOR_ALL = Path("/proc/sys/vm/unprivileged_userfaultfd")


def open_userfaultfd(
    pid: int, qmp: QmpClient, *, user_mode_only_ok: bool = False, remedy: str | None = None
) -> Userfaultfd:
    """Make a userfaultfd in the process and fetch it; one of the process's threads stands still for
    about 3 ms.

    An unprivileged VMM may not call userfaultfd(2); we lend it our /dev/userfaultfd by ``add-fd``
    instead.

    Args:
        user_mode_only_ok: as for ``kernel.remote_attach.attach``.
        remedy: an alternative to suggest if the host does not permit it.

    Raises:
        HostError, RefusedError, MachineError: as ``kernel.remote_attach.attach``; the guest keeps
            running.
    """

    def lend(fd: int) -> tuple[int, Callable[[], None]]:
        added = qmp.add_fd(fd)

        def take_back() -> None:
            with contextlib.suppress(MachineError):
                qmp.remove_fd(added)

        return added.fd, take_back

    try:
        _refuse_ourselves(pid)
        return attach(
            pid,
            lend_device=lend if qmp.passes_fds else None,
            user_mode_only_ok=user_mode_only_ok,
        )
    except (HostError, RefusedError) as error:
        _add_remedy(error, remedy)
        raise


def check_right(
    pid: int, qmp: QmpClient, *, user_mode_only_ok: bool = False, remedy: str | None = None
) -> None:
    """Raise in advance what ``open_userfaultfd`` would raise for lack of permission.

    This does not touch the process, so it misses what only an attempt shows (a seccomp filter).

    Raises:
        RefusedError: the process is our own.
        HostError: we may not trace the process, another tracer has it, or no userfaultfd for it is
            permitted.
        MachineError: the process is gone.
    """
    try:
        _refuse_ourselves(pid)
    except RefusedError as error:
        _add_remedy(error, remedy)
        raise
    refuse_tracer(pid)
    try:
        # Opening it takes the same permission as attaching (Linux fs/proc/base.c: proc_mem_open).
        os.close(os.open(f"/proc/{pid}/mem", os.O_RDONLY | os.O_CLOEXEC))
        powerful = may_trace_anybody(pid)
    except OSError as error:
        trouble = proc_error(pid, "the memory", error)
        _add_remedy(trouble, remedy)
        raise trouble from error
    lent = qmp.passes_fds and os.access(_DEVICE, os.R_OK | os.W_OK)
    if not (powerful or lent or user_mode_only_ok or _anybody_may()):
        refusal = host_error_for(errno.EPERM)
        refusal.guest_state = "running"
        _add_remedy(refusal, remedy)
        raise refusal


def _refuse_ourselves(pid: int) -> None:
    if pid == os.getpid():
        raise RefusedError(
            f"the VM runs in this very process ({pid})",
            why="a process cannot attach to itself (ptrace)",
            remedy="start it in a process of its own",
        )


def _add_remedy(error: StillframeError, remedy: str | None) -> None:
    if remedy is not None and error.remedy is not None:
        error.remedy = f"{error.remedy}; or {remedy}"


def _anybody_may() -> bool:
    """Return whether every process may have a userfaultfd for all faults (sysctl, Linux 5.2)."""
    try:
        return _FOR_ALL.read_text().strip() != "0"
    except FileNotFoundError:
        return True  # an older kernel has no such limit
    except OSError:
        return False
