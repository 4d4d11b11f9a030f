"""Frozen records that the rooms hand to each other. No behaviour beyond small derived values."""

from __future__ import annotations

from typing import Literal

import msgspec

JobState = Literal[
    "none",
    "setup",
    "active",
    "postcopy-active",
    "device",
    "completed",
    "failed",
    "cancelling",
    "cancelled",
]
"""States of a snapshot job, in QEMU's words (``qapi/migration.json``: MigrationStatus)."""

TARGET_PAGE_BYTES = 4096
"""The unit of QEMU's stream and of our files: the guest's page, on x86."""

Backing = Literal["anonymous", "memfd", "shmem", "hugetlbfs", "file"]
"""What lies under a RAM block: private anonymous memory, a memfd, a file on tmpfs or
hugetlbfs, or a file on a disk file system (which cannot be write-protected)."""


ProtectionKind = Literal["userfaultfd", "userfaultfd-user", "mprotect"]
"""What RAM is write-protected with: a userfaultfd, one that serves faults in user mode only, or
mprotect(2) and a SIGSEGV handler."""


FOR_ANALYSIS = "for analysis only: it has no device state, and cannot be restored"
"""What is said of such a snapshot, everywhere."""


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
    """Parts of the downtime, milliseconds, monotonic clock of the snapshotter.

    ``stop_ms``: until the vCPUs stood still; ``drain_ms``: from there until the requests in flight
    were completed and flushed, for which QEMU's ``stop`` waits.
    """

    stop_ms: float = 0.0
    drain_ms: float = 0.0
    devices_ms: float = 0.0
    disks_ms: float = 0.0
    protect_ms: float = 0.0
    cont_ms: float = 0.0

    @property
    def total_ms(self) -> float:
        return (
            self.stop_ms
            + self.drain_ms
            + self.devices_ms
            + self.disks_ms
            + self.protect_ms
            + self.cont_ms
        )


class PageCounts(msgspec.Struct, frozen=True, kw_only=True):
    """Pages of the snapshot by class, target pages (4096 bytes on x86).

    ``total == zero + data + unchanged``; ``never_populated`` is a part of ``zero`` (before an
    increment leaves zero pages out that were zero before), ``faulted`` a part of ``total``.
    ``unchanged``: of an increment: as in the parent, so not in the file.
    """

    total: int = 0
    zero: int = 0
    data: int = 0
    faulted: int = 0
    never_populated: int = 0
    unchanged: int = 0


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
    ``disks``: what becomes of the VM's disks, and what it costs, in words; empty without disks.
    ``disk_bytes``, ``disk_done_bytes``: of the copies of disks, as far as they are known.
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
    disks: str = ""
    disk_bytes: int = 0
    disk_done_bytes: int = 0


class ImageRecord(msgspec.Struct, frozen=True, kw_only=True):
    """One image of a disk, as the VMM has it open.

    ``driver``: how it reaches it (``file``, ``host_device``, ``nbd``, ...). ``format``: ``raw``,
    ``qcow2``, ... ``filename``: path, or what QEMU calls it. ``size_bytes``: as the guest sees it.
    """

    node_name: str
    driver: str
    format: str
    filename: str
    read_only: bool
    size_bytes: int


class DiskRecord(msgspec.Struct, frozen=True, kw_only=True):
    """A block device of the VM at the instant, as its live block graph has it.

    ``device``: its drive id; ``qdev``: QOM path of the device that the guest sees. ``filename``
    and ``driver``: file and format of the topmost image that has a name; empty without a medium.
    ``images``: all of them, topmost first, each the backing file of the one before.
    ``temporary``: the topmost one is a nameless file (``snapshot=on``) that ends with the VM.
    """

    device: str
    qdev: str
    node_name: str
    filename: str
    driver: str
    read_only: bool
    removable: bool = False
    images: tuple[ImageRecord, ...] = ()
    temporary: bool = False


class FileRecord(msgspec.Struct, frozen=True, kw_only=True):
    """A small text file of the host that was a part of the command line."""

    path: str
    text: str


class DomainRecord(msgspec.Struct, frozen=True, kw_only=True):
    """The libvirt domain that a machine is.

    ``xml``: migratable, with secrets, as ``virsh save`` stores it. ``live_xml``: of the running
    domain, for its ``<cpu>``.
    """

    uri: str
    uuid: str
    xml: str
    live_xml: str


class HostCpu(msgspec.Struct, frozen=True, kw_only=True):
    """A host's CPU in the words of ``/proc/cpuinfo``; ``flags`` are apart by blanks."""

    vendor: str
    family: str
    model: str
    name: str
    flags: str


class MachineRecord(msgspec.Struct, frozen=True, kw_only=True):
    """The machine that a snapshot was taken of; enough to start it again.

    ``argv``: the recorded command line, data and never a shell's. ``command_line``: one of a VMM
    that has the devices and media of the instant; empty where ``argv`` is. ``cwd``: the directory
    of relative paths in both. ``config_files``: what ``-readconfig`` read.
    ``differences``: what of the running VM ``command_line`` does not say, each with its name.
    ``cpu_ties``: why the guest goes on only on such a CPU as ``host_cpu``; usually empty.
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
    domain: DomainRecord | None = None
    command_line: tuple[str, ...] = ()
    config_files: tuple[FileRecord, ...] = ()
    differences: tuple[str, ...] = ()
    host_cpu: HostCpu | None = None
    cpu_ties: tuple[str, ...] = ()


class FrozenFile(msgspec.Struct, frozen=True, kw_only=True):
    """A file that a captured disk consists of, as it has to be found again.

    ``path``: relative to the snapshot's directory, or absolute. ``size_bytes``: the file's.
    ``mtime_ns``: 0 for a block device. ``head``: BLAKE3 of its first MiB, hex.
    ``digest``: BLAKE3 of all of it, hex; empty if nobody has read it all.
    """

    path: str
    format: str
    size_bytes: int
    mtime_ns: int
    head: str
    digest: str = ""

    @property
    def name_beside(self) -> str:
        """Its name, if it is in the snapshot's own directory of disks (which has the file's name
        and ``.disks``, whatever that is called by now); else empty."""
        head, beside, name = self.path.partition(".disks/")
        ours = beside and "/" not in head + name and not name.startswith(".")
        return name if ours else ""


class CapturedDisk(msgspec.Struct, frozen=True, kw_only=True):
    """A disk's content at the instant.

    ``device``, ``qdev``, ``node_name``: as in :class:`DiskRecord`. ``kind``: ``copy``, or
    ``overlay``: the image was frozen, and the VM writes to ``overlay`` above it since.
    ``files``: the image and what lies below it, from the top down. Nothing may write to them.
    """

    device: str
    qdev: str
    node_name: str
    kind: Literal["copy", "overlay"]
    virtual_size_bytes: int
    files: tuple[FrozenFile, ...]
    overlay: str = ""


class ParentRecord(msgspec.Struct, frozen=True, kw_only=True):
    """The snapshot that an increment goes with: its content id (64 hexadecimal digits), and where
    its file was (absolute; empty if it had no name)."""

    id: str
    path: str = ""


class Manifest(msgspec.Struct, frozen=True, kw_only=True):
    """The readable part of a snapshot file (docs/reference/file-format.md).

    ``format``: 1; 2 for an increment, which has a ``parent``.
    ``created``: wall clock, RFC 3339, UTC. ``mode``: how it came to be.
    ``stream_bytes``: length of the decompressed payload.
    ``for_analysis``: it has RAM only, and no device state: it cannot be restored.
    ``mark``: says that it was taken on this host by this user; empty without (still/host_mark.py).
    ``captured_disks``: the disks of this instant. ``without_disks``: those that the guest could
    write and that are not in the snapshot, as their user calls them. ``quiesced``: the guest's
    agent had frozen its file systems, so whoever loads it has to have them thawed. ``whole_of``: id
    of the increment that this is the whole form of. ``page_origins``: which pages were never
    populated, and which a fault saved (still/page_origins.py); empty if not recorded.
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
    for_analysis: bool = False
    mark: str = ""
    captured_disks: tuple[CapturedDisk, ...] = ()
    without_disks: tuple[str, ...] = ()
    quiesced: bool = False
    parent: ParentRecord | None = None
    whole_of: str = ""
    page_origins: str = ""
