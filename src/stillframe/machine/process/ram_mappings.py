"""RAM blocks at known places, joined with the mappings under them in the VMM's address space."""

from __future__ import annotations

import contextlib
import os
import stat
from collections.abc import Sequence
from pathlib import Path
from typing import Protocol

import msgspec

from stillframe.errors import RefusedError
from stillframe.kernel.proc_maps import (
    AddressSpace,
    Vma,
    file_system_types,
    proc_error,
    read_maps,
)
from stillframe.model import Backing, RamBlock

_SMALL_PAGE_BYTES = os.sysconf("SC_PAGE_SIZE")
_TMPFS = ("tmpfs", "ramfs", "devtmpfs")

Signature = tuple[tuple[str, int, int, int], ...]
"""(name, hva or ram_addr, used length, maximal length) of every block, in the VMM's order."""


class RamTable(Protocol):
    """A reader of one VM's RAM blocks, as often as wanted. The guest is not touched."""

    def read(self) -> list[RamBlock]:
        """Return the migratable blocks, in the VMM's order, with page size and the mapping under
        each.

        Raises:
            RefusedError: the blocks cannot be determined for certain, or are not mapped as they
                should be.
            MachineError, HostError: the monitor or ``/proc`` is out of reach.
        """

    def signature(self) -> Signature:
        """Return what must not change during a snapshot: cheap to read, and to compare.

        Raises:
            MachineError: the monitor went away.
        """

    def close(self) -> None:
        """Release descriptors."""


class PlacedBlock(msgspec.Struct, frozen=True, kw_only=True):
    """A RAM block and its place in the VMM's address space; lengths in bytes."""

    idstr: str
    hva: int
    used_length_bytes: int
    max_length_bytes: int
    page_size_bytes: int


def mapped_blocks(pid: int, placed: Sequence[PlacedBlock]) -> list[RamBlock]:
    """Return the blocks with what ``/proc/PID`` shows of the memory under them.

    Raises:
        RefusedError: a block is not mapped as one piece.
        HostError: not permitted. MachineError: the process is gone.
    """
    space = read_maps(pid)
    types = file_system_types(pid)
    files = _open_files(pid)
    return [_ram_block(block, space, types, files) for block in placed]


def _open_files(pid: int) -> dict[tuple[tuple[int, int], int], int]:
    """Return the VMM's regular files: (device, inode) to its lowest descriptor of that file."""
    files: dict[tuple[tuple[int, int], int], int] = {}
    directory = f"/proc/{pid}/fd"
    try:
        names = sorted(os.listdir(directory), key=int)  # noqa: PTH208 - names, not paths
    except OSError as error:
        raise proc_error(pid, "the open files", error) from error
    for name in names:
        with contextlib.suppress(OSError):  # closed meanwhile
            info = Path(directory, name).stat()
            if stat.S_ISREG(info.st_mode):
                device = (os.major(info.st_dev), os.minor(info.st_dev))
                files.setdefault((device, info.st_ino), int(name))
    return files


def _ram_block(
    block: PlacedBlock,
    space: AddressSpace,
    types: dict[tuple[int, int], str],
    files: dict[tuple[tuple[int, int], int], int],
) -> RamBlock:
    vmas = space.covering(block.hva, block.used_length_bytes)
    first = vmas[0] if vmas else None
    if vmas is None or first is None or any(not _continues(first, vma) for vma in vmas):
        raise RefusedError(
            f"RAM block {block.idstr} is not mapped as one piece in the VM",
            why=f"at {block.hva:#x}, {block.used_length_bytes} bytes",
            remedy="report it, with the VM's command line",
        )
    backing = _backing(first, types, block.page_size_bytes)
    named = first.inode != 0
    return RamBlock(
        idstr=block.idstr,
        hva=block.hva,
        used_length_bytes=block.used_length_bytes,
        max_length_bytes=block.max_length_bytes,
        page_size_bytes=block.page_size_bytes,
        backing=backing,
        shared=first.shared,
        readonly=not first.writable,
        backing_fd=files.get((first.device, first.inode)) if named else None,
        backing_offset_bytes=first.offset_bytes + block.hva - first.start if named else 0,
        backing_path=first.path.removesuffix(" (deleted)") if named else None,
    )


def _continues(first: Vma, vma: Vma) -> bool:
    """Return whether a mapping shows the same object as the first, further on."""
    if (vma.shared, vma.writable, vma.device, vma.inode) != (
        first.shared,
        first.writable,
        first.device,
        first.inode,
    ):
        return False
    return vma.inode == 0 or vma.offset_bytes - first.offset_bytes == vma.start - first.start


def _backing(vma: Vma, types: dict[tuple[int, int], str], page_size_bytes: int) -> Backing:
    if vma.inode == 0:
        return "anonymous"
    kind = types.get(vma.device)
    # Before the name: a memfd may have huge pages, which behave differently.
    if page_size_bytes > _SMALL_PAGE_BYTES or kind == "hugetlbfs":
        return "hugetlbfs"
    if vma.path.startswith("/memfd:"):
        return "memfd"
    # QEMU's unnamed shared memory is on the kernel's own, unmounted tmpfs.
    if kind in _TMPFS or vma.path.startswith(("/dev/zero", "/SYSV")):
        return "shmem"
    return "file"
