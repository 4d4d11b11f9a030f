"""A snapshotter beside the VM in one memory cgroup must not be what gets the VM killed.

``kubectl exec`` and ``systemd-run --slice`` put us into the VM's cgroup, where the kernel kills the
biggest process when the limit is reached: the VM. So we are made the one to be killed, our memory
is bounded by what is left, and too little of it is told before anything is touched.
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
"""Buffers, index and threads of a snapshotter that has started, with room to spare."""
_SMALLEST_SPILL_BYTES = 4 << 20


@contextmanager
def first_to_be_killed() -> Iterator[None]:
    """Inside, the kernel's OOM killer takes this process rather than the VM, on the host and in a
    cgroup. Raising one's own score needs no right."""
    try:
        before = _OOM_SCORE.read_text()
        _OOM_SCORE.write_text(_FIRST_TO_DIE)
    except OSError:
        yield
        return
    try:
        yield
    finally:
        with contextlib.suppress(OSError):  # an unprivileged process may not go below its least
            _OOM_SCORE.write_text(before)


def spill_within_limit(pid: int, wanted_bytes: int) -> int:
    """The spill that fits beside VM process ``pid`` into the cgroups that we share with it.

    Raises:
        HostError: there is not even room for the smallest; the guest was not touched.
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
    """To read a VM's RAM without swapping it in for good; None if nothing of it is in swap, or it
    is not permitted, but swapping it in does no harm.

    Raises:
        HostError: not permitted, and there is no room in its memory cgroup; see
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
    """Whether what VM process ``pid`` has swapped out fits into its memory cgroups.

    Reading a guest's RAM swaps it in, which is charged to the VM. Where that goes beyond its limit
    faster than the kernel reclaims, the kernel kills the VM (measured: Linux 6.18, cgroup v1).

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
