"""Pre-flight checks that ask the host: who else can write or drop the guest's RAM."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from pathlib import Path

from stillframe.errors import StillframeError
from stillframe.machine import Hindrance
from stillframe.machine.outside.evidence import Evidence, fd_targets
from stillframe.machine.outside.proc_maps import parse_maps, read_smaps
from stillframe.machine.outside.vm_info import process_ids
from stillframe.model import RamBlock

_USERFAULTFD_FLAGS = frozenset({"um", "uw", "ui"})
"""Registered for missing pages, write-protection or minor faults (fs/proc/task_mmu.c)."""


def another_userfaultfd(evidence: Evidence) -> Iterator[Hindrance]:
    """Memory can be registered with one userfaultfd only; the kernel refuses a second one.

    Whether RAM is registered stands in ``smaps``, for which the kernel walks all page tables (30 ms
    per GiB of shared RAM). So it is read only if somebody has a userfaultfd at all.
    """
    if not any(_holds_userfaultfd(pid) for pid in process_ids()):
        return
    starts = {vma.start for vma in evidence.ram_vmas}
    if any(
        detail.vma.start in starts and detail.flags & _USERFAULTFD_FLAGS
        for detail in read_smaps(evidence.info.pid)
    ):
        yield Hindrance(
            name="userfaultfd",
            reason="another userfaultfd watches the VM's RAM (a postcopy migration, another"
            " snapshot, or a memory tracker)",
            remedy="wait until it is done",
            severity="refuse",
        )


def _holds_userfaultfd(pid: int) -> bool:
    try:
        return "anon_inode:[userfaultfd]" in fd_targets(pid)
    except StillframeError:
        return False  # gone, or somebody else's


def file_backed(evidence: Evidence) -> Iterator[Hindrance]:
    """A file on a disk file system cannot be write-protected by userfaultfd."""
    blocks = [block for block in evidence.blocks if block.backing == "file"]
    if blocks and evidence.mode == "background":
        yield Hindrance(
            name="file-backed-ram",
            reason="RAM in a file on a disk file system cannot be write-protected: "
            + ", ".join(f"{block.idstr} ({block.backing_path})" for block in blocks),
            remedy="use --mode stop, or memory-backend-memfd, -ram, or a file on tmpfs",
            severity="refuse",
        )


def read_only(evidence: Evidence) -> Iterator[Hindrance]:
    """The VM cannot write such a block, but whoever owns the file can."""
    for block in evidence.blocks:
        if block.readonly:
            yield Hindrance(
                name="read-only-ram",
                reason=f"block {block.idstr} is mapped read-only from {block.backing_path}",
                remedy="do not change that file during the snapshot",
                severity="warn",
            )


def second_mapper(evidence: Evidence) -> Iterator[Hindrance]:
    """Another process that can write the same shared memory (ivshmem, vhost-user, a helper).

    Processes of other users that may not be looked into are passed over: without root only
    the check of vhost-user devices sees theirs.
    """
    shared = {
        (vma.device, vma.inode): block
        for block in evidence.blocks
        if block.shared
        for vma in evidence.ram_vmas
        if vma.inode and vma.start <= block.hva < vma.end
    }
    if not shared:
        return
    own = {evidence.info.pid, os.getpid()}
    for pid in process_ids():
        if pid in own:
            continue
        block = _writable_mapping(pid, shared)
        if block is None:
            continue
        try:
            comm = Path(f"/proc/{pid}/comm").read_text(errors="replace").strip()
        except OSError:
            continue  # gone, and its mapping with it
        yield Hindrance(
            name="second-mapper",
            reason=f"process {pid} ({comm}) can write RAM block {block.idstr} as well",
            remedy="end that process or unplug the device it serves, or use --mode stop"
            " while it is idle",
            severity="refuse" if evidence.mode == "background" else "warn",
        )


def _writable_mapping(
    pid: int, shared: dict[tuple[tuple[int, int], int], RamBlock]
) -> RamBlock | None:
    try:
        data = Path(f"/proc/{pid}/maps").read_bytes()
    except OSError:
        return None
    if not any(b" %d " % inode in data for _device, inode in shared):
        return None  # most processes: not worth parsing
    for vma in parse_maps(data):
        block = shared.get((vma.device, vma.inode))
        if block is not None and vma.shared and vma.writable:
            return block
    return None


CHECKS: tuple[Callable[[Evidence], Iterator[Hindrance]], ...] = (
    another_userfaultfd,
    file_backed,
    read_only,
    second_mapper,
)
