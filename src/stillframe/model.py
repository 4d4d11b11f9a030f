"""Frozen records that the rooms hand to each other. No behaviour beyond small derived values."""

from __future__ import annotations

from typing import Literal

import msgspec

JobState = Literal["none", "setup", "active", "completed", "failed", "cancelled"]
"""States of a snapshot job, in QEMU's words (``qapi/migration.json``: MigrationStatus)."""

Backing = Literal["anonymous", "memfd", "shmem", "hugetlbfs", "file"]
"""What lies under a RAM block: private anonymous memory, a memfd, a file on tmpfs or
hugetlbfs, or a file on a disk file system (which cannot be write-protected)."""


ProtectionKind = Literal["userfaultfd", "userfaultfd-user", "mprotect"]
"""What RAM is write-protected with: a userfaultfd, one that serves faults in user mode only, or
mprotect(2) and a SIGSEGV handler."""


class RamBlock(msgspec.Struct, frozen=True, kw_only=True):
    """One contiguous piece of guest RAM (QEMU ``include/exec/ramblock.h``).

    ``hva``: host virtual address in the VMM's address space, bytes.
    ``used_length_bytes``: what goes into the stream; ``max_length_bytes``: what is mapped.
    ``page_size_bytes``: the host page size behind the block (4096, or a hugetlb size).
    ``shared``: mapped MAP_SHARED in the VMM.
    ``backing_fd``: the VMM's own fd number of a memfd or file behind it, or None.
    ``backing_offset_bytes``: where the block starts in that file.
    """

    idstr: str
    hva: int
    used_length_bytes: int
    max_length_bytes: int
    page_size_bytes: int
    backing: Backing = "anonymous"
    shared: bool = False
    readonly: bool = False
    backing_fd: int | None = None
    backing_offset_bytes: int = 0
    backing_path: str | None = None

    @property
    def pages(self) -> int:
        """Number of pages (of ``page_size_bytes``) in the used length, rounded up."""
        return -(-self.used_length_bytes // self.page_size_bytes)


class BlockRecord(msgspec.Struct, frozen=True, kw_only=True):
    """A RAM block as the manifest keeps it: what a reader of the snapshot needs."""

    idstr: str
    used_length_bytes: int
    page_size_bytes: int


class GpaRange(msgspec.Struct, frozen=True, kw_only=True):
    """One run of guest-physical addresses that shows a part of a RAM block."""

    gpa: int
    length_bytes: int
    idstr: str
    offset_bytes: int


class Downtime(msgspec.Struct, frozen=True, kw_only=True):
    """Parts of the downtime, milliseconds, monotonic clock of the snapshotter."""

    stop_ms: float = 0.0
    devices_ms: float = 0.0
    disks_ms: float = 0.0
    protect_ms: float = 0.0
    cont_ms: float = 0.0

    @property
    def total_ms(self) -> float:
        return self.stop_ms + self.devices_ms + self.disks_ms + self.protect_ms + self.cont_ms


class PageCounts(msgspec.Struct, frozen=True, kw_only=True):
    """Pages of the snapshot by class, target pages (4096 bytes on x86).

    ``total == zero + data``; ``never_populated`` is a part of ``zero``,
    ``faulted`` a part of ``total``.
    """

    total: int = 0
    zero: int = 0
    data: int = 0
    faulted: int = 0
    never_populated: int = 0


class StoppedWrite(msgspec.Struct, frozen=True, kw_only=True):
    """Guest RAM written between stop and cont, by the VMM itself (invariant 8)."""

    idstr: str
    offset_bytes: int
    length_bytes: int


class Statistics(msgspec.Struct, frozen=True, kw_only=True):
    """What a snapshot job knows about itself; progress while it runs, the result at its end.

    Sizes in bytes, times in milliseconds or microseconds as named, all monotonic.
    ``stall_ms``: the sum of the times that faults waited because the spill was full.
    ``rate_bytes_per_s``: written to the destination over the last seconds, 0.0 in the first second.
    ``protection``: what RAM is write-protected with; None without (``--mode stop``).
    ``eta_s``: until RAM is through at the present pace; None if it cannot be told.
    """

    state: JobState = "none"
    phase: str = "none"
    downtime_ms: float = 0.0
    downtime: Downtime = Downtime()
    arm_ms: float = 0.0
    total_ms: float = 0.0
    ram_bytes: int = 0
    ram_done_bytes: int = 0
    file_bytes: int = 0
    pages: PageCounts = PageCounts()
    faults: int = 0
    fault_p50_us: float = 0.0
    fault_p99_us: float = 0.0
    fault_max_us: float = 0.0
    stall_ms: float = 0.0
    spill_limit_bytes: int = 0
    spill_used_bytes: int = 0
    spill_peak_bytes: int = 0
    rate_bytes_per_s: float = 0.0
    eta_s: float | None = None
    protection: ProtectionKind | None = None
    writes_while_stopped: tuple[StoppedWrite, ...] = ()


class DiskRecord(msgspec.Struct, frozen=True, kw_only=True):
    """A block device of the VM at the instant, as the monitor's ``query-block`` names it."""

    device: str
    qdev: str
    node_name: str
    filename: str
    driver: str
    read_only: bool
    removable: bool = False


class MachineRecord(msgspec.Struct, frozen=True, kw_only=True):
    """The machine that a snapshot was taken of; enough to start it again.

    ``argv``: the recorded command line, data and never a shell's.
    ``cwd``: the VMM's working directory, for relative paths in ``argv``.
    """

    name: str
    pid: int
    uid: int
    vmm: str
    vmm_version: str
    machine_type: str
    accelerator: str
    executable: str
    argv: tuple[str, ...]
    cwd: str
    guest_state: str
    vcpus: int
    disks: tuple[DiskRecord, ...] = ()


class Manifest(msgspec.Struct, frozen=True, kw_only=True):
    """The readable part of a snapshot file (docs/reference/file-format.md).

    ``created``: wall clock, RFC 3339, UTC. ``mode``: how it came to be.
    ``stream_bytes``: length of the decompressed payload.
    """

    format: int = 1
    created: str
    mode: Literal["background", "stop", "import"]
    stillframe_version: str
    target_page_bytes: int = 4096
    stream_bytes: int
    blocks: tuple[BlockRecord, ...]
    memory_map: tuple[GpaRange, ...] = ()
    machine: MachineRecord | None = None
    statistics: Statistics | None = None
    notes: tuple[str, ...] = ()
