"""Memory limits: a snapshotter in the VM's memory cgroup must not get the VM killed.

``kubectl exec`` and ``systemd-run --slice`` put us into the VM's cgroup, where the kernel kills the
biggest process at the limit: the VM. So we make ourselves the OOM killer's first choice, bound our
memory by what is left, and refuse before touching anything if that is too little.
Source: proc(5): oom_score_adj.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

from stillframe.capture.swapping import SwapAccess, swapped_bytes
from stillframe.errors import HostError
from stillframe.kernel.memory_cgroups import memory_cgroups
from stillframe.model import RamBlock

_OOM_SCORE = Path("/proc/self/oom_score_adj")
_FIRST_TO_DIE = "1000"
_OWN_BYTES = 48 << 20
"""Buffers, index and threads of a running snapshotter, with a margin."""
_SMALLEST_SPILL_BYTES = 4 << 20


@contextmanager
def first_to_be_killed() -> Iterator[None]:
    """Within the context, make the OOM killer take this process rather than the VM, on the host
    and in a cgroup. Raising one's own score needs no privilege."""
    try:
        before = _OOM_SCORE.read_text()
        _OOM_SCORE.write_text(_FIRST_TO_DIE)
    except OSError:
        yield
        return
    try:
        yield
    finally:
        with contextlib.suppress(OSError):  # unprivileged, the score has a minimum
            _OOM_SCORE.write_text(before)


def spill_within_limit(pid: int, wanted_bytes: int) -> int:
    """Return the spill, at most ``wanted_bytes``, that fits into the cgroups that this process
    shares with VM process ``pid``.

    Raises:
        HostError: not even the smallest spill fits; the guest was not touched.
    """
    shared = set(memory_cgroups("self")) & set(memory_cgroups(pid))
    rooms = [room for cgroup in shared if (room := cgroup.room_bytes()) is not None]
    if not rooms:
        return wanted_bytes
    room_bytes = min(rooms)
    spill_bytes = (room_bytes - _OWN_BYTES) // 2
    if spill_bytes < _SMALLEST_SPILL_BYTES:
        needed_mib = (_OWN_BYTES + 2 * _SMALLEST_SPILL_BYTES) >> 20
        raise HostError(
            "too little memory is left in the VM's memory cgroup, which we are in, too",
            why=f"{room_bytes >> 20} MiB are left, and {needed_mib} MiB needed; beyond the"
            " limit the kernel kills processes",
            remedy="run it outside of the VM's cgroup, or raise that cgroup's limit",
            guest_state="running",
        )
    return min(wanted_bytes, spill_bytes)


def swap_access(pid: int, blocks: Sequence[RamBlock]) -> SwapAccess | None:
    """Open access for reading a VM's RAM without leaving it swapped in.

    Returns:
        None if no RAM is in swap, or if access is not permitted but swapping in does no harm.

    Raises:
        HostError: access is not permitted, and the VM's memory cgroup has no room; see
            :func:`check_room_for_swap`.
    """
    if not swapped_bytes(pid, blocks):
        return None
    too_narrow = _without_room(pid)
    try:
        return SwapAccess(pid, is_tight=too_narrow is not None)
    except OSError:
        if too_narrow is not None:
            raise too_narrow from None
        return None


def check_room_for_swap(pid: int) -> None:
    """Check that the swapped-out memory of VM process ``pid`` fits into its memory cgroups.

    Reading a guest's RAM swaps it in, which is charged to the VM. If that exceeds the limit faster
    than the kernel reclaims, the kernel kills the VM (measured: Linux 6.18, cgroup v1).

    Raises:
        HostError: it does not fit; the guest was not touched.
    """
    too_narrow = _without_room(pid)
    if too_narrow is not None:
        raise too_narrow


def _without_room(pid: int) -> HostError | None:
    for cgroup in memory_cgroups(pid):
        swapped, room_bytes = cgroup.swapped_bytes(), cgroup.room_bytes()
        if room_bytes is not None and swapped > room_bytes:
            return HostError(
                "the VM swaps inside its memory cgroup's limit",
                why=f"reading its RAM swaps {swapped >> 20} MiB in, {room_bytes >> 20} MiB"
                " are left, and the kernel might kill the VM",
                remedy="take it as root, which leaves in swap what is there, or raise the limit of"
                f" {cgroup.directory} for the time of the snapshot",
                guest_state="running",
            )
    return None
