"""Hung requests to the VM's disks, as its process shows them.

QEMU's ``stop`` pauses the vCPUs first and then waits for every request without a limit
(``system/cpus.c``: do_vm_stop); nothing can cancel that wait. So look for hung requests before.
"""

from __future__ import annotations

import contextlib
import time
from collections.abc import Callable, Hashable
from collections.abc import Set as AbstractSet
from pathlib import Path

from stillframe.errors import MachineError

Pending = AbstractSet[tuple[str, Hashable]]
"""Requests under way: a label, and a mark that changes if the request makes progress. Several
requests may have the same label."""

_PATIENCE_S = 3.0
_LOOK_EVERY_S = 0.02
_FILE_IO = frozenset({17, 18, 74, 75, 277, 285, 295, 296, 327, 328})
"""System calls of x86-64 that read, write, allocate or sync a file: pread64, pwrite64, fsync,
fdatasync, sync_file_range, fallocate, preadv, pwritev, preadv2, pwritev2."""


def stuck(look: Callable[[], Pending]) -> list[str]:
    """Return the requests that make no progress for three seconds; as soon as all do, return
    none."""
    pending = set(look())
    deadline_s = time.monotonic() + _PATIENCE_S
    while pending and time.monotonic() < deadline_s:
        time.sleep(_LOOK_EVERY_S)
        pending &= look()
    return sorted({name for name, _mark in pending})


def file_requests(pid: int) -> Pending:
    """Return the files that threads of the process are reading, writing or syncing (proc(5):
    syscall)."""
    found: set[tuple[str, Hashable]] = set()
    with contextlib.suppress(OSError):
        for task in Path(f"/proc/{pid}/task").iterdir():
            with contextlib.suppress(OSError):
                call = (task / "syscall").read_text().split()
                if call[0].isdigit() and int(call[0]) in _FILE_IO:
                    target = str(Path(f"/proc/{pid}/fd/{int(call[1], 16)}").readlink())
                    if target.startswith("/"):
                        found.add((target, (task.name, *call, _switches(task))))
    return found


def _switches(task: Path) -> str:
    """Return how often the thread went to sleep: an unchanged number means the same sleep."""
    text = (task / "status").read_text()
    return text.partition("\nvoluntary_ctxt_switches:")[2].split(None, 1)[0]


def unanswered_stop(pid: int, waited_s: float) -> MachineError:
    """Return the error for an unanswered ``stop``, from the process alone: the monitor is
    silent."""
    files = ", ".join(sorted({name for name, _mark in file_requests(pid)}))
    return MachineError(
        f"the VM has not stopped within {waited_s:g} s",
        why=f"a request to {files or 'one of its disks'} hangs, and QEMU waits for it",
        remedy="mend that storage: the guest goes on by itself once it has answered",
        guest_state="paused",
    )
