"""The pre-flight's host checks: which other processes can write or drop the guest's RAM."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from pathlib import Path

from stillframe.errors import StillframeError
from stillframe.kernel.proc_maps import parse_maps, read_smaps
from stillframe.machine import Blocker
from stillframe.machine.process.inspection import Inspection, fd_targets
from stillframe.machine.process.vm_info import process_ids
from stillframe.model import RamBlock

Check = Callable[[Inspection], Iterator[Blocker]]

KSM_RUN = Path("/sys/kernel/mm/ksm/run")
"""1 while the kernel merges equal pages (``Documentation/admin-guide/mm/ksm.rst``)."""
KSM_REMEDY = (
    f"echo 0 >{KSM_RUN} (2 also un-merges what is merged), start the VM with"
    " -machine mem-merge=off, or use --mode stop"
)
_USERFAULTFD_FLAGS = frozenset({"um", "uw", "ui"})
"""Registered for missing pages, write-protection or minor faults (fs/proc/task_mmu.c)."""


def another_userfaultfd(inspection: Inspection) -> Iterator[Blocker]:
    """Find another userfaultfd on the RAM: the kernel refuses a second one for the same memory.

    ``smaps`` shows whether RAM is registered, but the kernel walks all page tables for it (30 ms
    per GiB of shared RAM). So read it only if some process has a userfaultfd at all.
    """
    if not any(_holds_userfaultfd(pid) for pid in process_ids()):
        return
    if _has_flag(inspection, _USERFAULTFD_FLAGS):
        yield Blocker(
            name="userfaultfd",
            reason="another userfaultfd watches the VM's RAM (a postcopy migration, another"
            " snapshot, or a memory tracker)",
            remedy="wait until it is done",
            severity="busy",
        )


def _has_flag(inspection: Inspection, flags: frozenset[str]) -> bool:
    """Return whether a mapping of the RAM has one of these VmFlags."""
    starts = {vma.start for vma in inspection.ram_vmas}
    return any(
        detail.vma.start in starts and detail.flags & flags
        for detail in read_smaps(inspection.info.pid)
    )


def _holds_userfaultfd(pid: int) -> bool:
    try:
        return "anon_inode:[userfaultfd]" in fd_targets(pid)
    except StillframeError:
        return False  # gone, or another user's


def file_backed(inspection: Inspection) -> Iterator[Blocker]:
    """Find RAM in a file on a disk file system, which userfaultfd cannot write-protect."""
    blocks = [block for block in inspection.blocks if block.backing == "file"]
    if blocks and inspection.mode == "background":
        yield Blocker(
            name="file-backed-ram",
            reason="RAM in a file on a disk file system cannot be write-protected: "
            + ", ".join(f"{block.idstr} ({block.backing_path})" for block in blocks),
            remedy="use --mode stop, or memory-backend-memfd, -ram, or a file on tmpfs; a VM that"
            " was restored on a complete image: restore it with --fill",
            severity="refuse",
        )


def read_only(inspection: Inspection) -> Iterator[Blocker]:
    """Find blocks that the VM cannot write, but the owner of the file can."""
    for block in inspection.blocks:
        if block.readonly:
            yield Blocker(
                name="read-only-ram",
                reason=f"block {block.idstr} is mapped read-only from {block.backing_path}",
                remedy="do not change that file during the snapshot",
                severity="warn",
            )


def second_mapper(inspection: Inspection) -> Iterator[Blocker]:
    """Find another process that can write the same shared memory (ivshmem, vhost-user, a helper).

    Skips processes of other users that we may not inspect: without root, only the check of
    vhost-user devices sees theirs.
    """
    shared = {
        (vma.device, vma.inode): block
        for block in inspection.blocks
        if block.shared
        for vma in inspection.ram_vmas
        if vma.inode and vma.start <= block.hva < vma.end
    }
    if not shared:
        return
    own = {inspection.info.pid, os.getpid()}
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
        yield Blocker(
            name="second-mapper",
            reason=f"process {pid} ({comm}) can write RAM block {block.idstr} as well",
            remedy="end that process or unplug the device it serves, or use --mode stop"
            " while it is idle",
            severity="refuse" if inspection.mode == "background" else "warn",
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


def merged(inspection: Inspection) -> Iterator[Blocker]:
    """Find RAM that KSM merges. KSM maps one page in place of equal ones, and drops the
    write-protect bit with the old page table entry (``mm/ksm.c``, replace_page): the next write
    goes unnoticed."""
    if inspection.mode != "background" or not inspection.ram_vmas or not merges_pages():
        return
    if _has_flag(inspection, frozenset({"mg"})):
        yield Blocker(
            name="ksm",
            reason="the host merges equal pages of the VM's RAM (KSM), which takes their"
            " write-protection away unseen",
            remedy=KSM_REMEDY,
            severity="refuse",
        )


def merges_pages() -> bool:
    """Return whether the host merges equal pages now."""
    try:
        return KSM_RUN.read_text().strip() == "1"
    except OSError:
        return False  # a kernel without it


WRITERS: tuple[Check, ...] = (second_mapper, merged)
CHECKS: tuple[Check, ...] = (
    another_userfaultfd,
    file_backed,
    read_only,
    *WRITERS,
)
