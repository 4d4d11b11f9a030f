"""A process's memory according to ``/proc/PID/maps``, ``smaps`` and ``mountinfo`` (proc(5))."""

from __future__ import annotations

import bisect
import os
import re
from collections.abc import Iterable, Iterator
from pathlib import Path

import msgspec

from stillframe.errors import HostError, MachineError, StillframeError, host_error

_LINE = re.compile(
    rb"([0-9a-f]+)-([0-9a-f]+) ([r-])([w-])([x-])([sp]) ([0-9a-f]+)"
    rb" ([0-9a-f]+):([0-9a-f]+) (\d+) *(.*)"
)


class Vma(msgspec.Struct, frozen=True):
    """One mapping. Addresses are the process's virtual addresses, bytes."""

    start: int
    end: int
    readable: bool
    writable: bool
    shared: bool
    offset_bytes: int
    device: tuple[int, int]
    inode: int
    path: str

    @property
    def length_bytes(self) -> int:
        return self.end - self.start


class VmaDetail(msgspec.Struct, frozen=True):
    """A mapping with details from ``smaps``: page size, VmFlags, and how much is in swap, including
    shared memory."""

    vma: Vma
    page_size_bytes: int
    swapped_bytes: int
    flags: frozenset[str]


class AddressSpace:
    """The mappings of a process, sorted, for look-up by address."""

    def __init__(self, vmas: Iterable[Vma]) -> None:
        self.vmas = sorted(vmas, key=lambda vma: vma.start)
        self._starts = [vma.start for vma in self.vmas]

    def covering(self, start: int, length_bytes: int) -> list[Vma] | None:
        """Return the mappings under a range in order, or None if the range has a gap."""
        found: list[Vma] = []
        at = start
        index = max(0, bisect.bisect_right(self._starts, start) - 1)
        for vma in self.vmas[index:]:
            if at >= start + length_bytes:
                break
            if not vma.start <= at < vma.end:
                return None
            found.append(vma)
            at = vma.end
        return found if found and at >= start + length_bytes else None


def _parse_line(line: bytes) -> Vma | None:
    match = _LINE.fullmatch(line.rstrip(b"\n"))
    if match is None:
        return None
    start, end, read, write, _exec, shared, offset, major, minor, inode, path = match.groups()
    return Vma(
        start=int(start, 16),
        end=int(end, 16),
        readable=read == b"r",
        writable=write == b"w",
        shared=shared == b"s",
        offset_bytes=int(offset, 16),
        device=(int(major, 16), int(minor, 16)),
        inode=int(inode),
        path=os.fsdecode(path),
    )


def proc_error(pid: int, what: str, error: OSError) -> StillframeError:
    """Return our error for an OS error in ``/proc/PID``."""
    if isinstance(error, PermissionError):
        return HostError(
            f"may not read {what} of process {pid}",
            why="permission denied",
            remedy="run as the VM's user with CAP_SYS_PTRACE, or as root",
            guest_state="running",
        )
    if isinstance(error, FileNotFoundError | ProcessLookupError):
        return MachineError(
            f"cannot read {what} of process {pid}",
            why="it is gone",
            remedy="look whether the VM still runs",
            guest_state="unknown",
        )
    return host_error(f"cannot read {what} of process {pid}", error)


def read_maps(pid: int) -> AddressSpace:
    """Read the mappings of a process.

    Raises:
        HostError: not permitted, or out of descriptors. MachineError: the process is gone.
    """
    try:
        data = Path(f"/proc/{pid}/maps").read_bytes()
    except OSError as error:
        raise proc_error(pid, "the memory map", error) from error
    return AddressSpace(parse_maps(data))


def parse_maps(data: bytes) -> Iterator[Vma]:
    """Parse the text of a ``/proc/PID/maps``."""
    return (vma for line in data.splitlines() if (vma := _parse_line(line)))


def read_smaps(pid: int) -> Iterator[VmaDetail]:
    """Yield the mappings with their details. Slow: the kernel walks the page tables.

    Raises:
        HostError: not permitted, or out of descriptors. MachineError: the process is gone.
    """
    try:
        data = Path(f"/proc/{pid}/smaps").read_bytes()
    except OSError as error:
        raise proc_error(pid, "the memory map", error) from error
    vma: Vma | None = None
    page_size_bytes, swapped_bytes = 4096, 0
    for line in data.splitlines():
        if line.startswith(b"KernelPageSize:"):
            page_size_bytes = int(line.split()[1]) * 1024
        elif line.startswith(b"Swap:"):
            swapped_bytes = int(line.split()[1]) * 1024
        elif line.startswith(b"VmFlags:"):
            if vma is not None:
                flags = frozenset(line[8:].decode("ascii", "replace").split())
                yield VmaDetail(vma, page_size_bytes, swapped_bytes, flags)
            vma = None
        elif (parsed := _parse_line(line)) is not None:
            vma, page_size_bytes, swapped_bytes = parsed, 4096, 0


def file_system_types(pid: int) -> dict[tuple[int, int], str]:
    """Return the file system types of the process's mounts, by device number (mountinfo)."""
    try:
        text = Path(f"/proc/{pid}/mountinfo").read_text(errors="surrogateescape")
    except OSError as error:
        raise proc_error(pid, "the mounts", error) from error
    types: dict[tuple[int, int], str] = {}
    for line in text.splitlines():
        fields = line.split(" ")
        if "-" not in fields[6:]:
            continue
        major, _, minor = fields[2].partition(":")
        if major.isdigit() and minor.isdigit():
            types[int(major), int(minor)] = fields[fields.index("-", 6) + 1]
    return types
