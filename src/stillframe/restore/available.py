"""The memory that is free for a VM to be restored: on the host, and in our memory cgroup."""

from __future__ import annotations

from pathlib import Path

from stillframe.errors import HostError
from stillframe.kernel.memory_cgroups import memory_cgroups
from stillframe.kernel.proc_fields import read_fields

_MEMINFO = Path("/proc/meminfo")


def check_memory(needed_bytes: int) -> None:
    """Refuse a start that would end in the host's or the cgroup's OOM killer.

    Raises:
        HostError: there is less memory than the VM takes.
    """
    for where, free_bytes in (("the host", _host_free()), ("the memory cgroup", _cgroup_free())):
        if free_bytes is not None and free_bytes < needed_bytes:
            raise HostError(
                "there is too little memory for the VM",
                why=f"it takes {needed_bytes >> 20} MiB, {where} has {free_bytes >> 20} MiB free",
                remedy="free memory, or start it on another host",
            )


def resident_bytes(pid: int) -> int:
    """Return the memory and swap of a process (proc_pid_status(5)), bytes; 0 if unknown."""
    fields = read_fields(Path(f"/proc/{pid}/status"))
    return (fields.get("VmRSS", 0) + fields.get("VmSwap", 0)) << 10


def _host_free() -> int | None:
    """Return MemAvailable and free swap (proc_meminfo(5)), bytes; None if unknown."""
    fields = read_fields(_MEMINFO)
    if "MemAvailable" not in fields:
        return None
    return (fields["MemAvailable"] + fields.get("SwapFree", 0)) << 10


def _cgroup_free() -> int | None:
    """Return what this process and the new VM may still take, bytes; None without a limit."""
    rooms = (cgroup.room_bytes() for cgroup in memory_cgroups("self"))
    return min((room for room in rooms if room is not None), default=None)
