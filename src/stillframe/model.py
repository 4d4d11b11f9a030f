"""Frozen records that rooms exchange. No behaviour beyond small derived values."""

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
"""States of a snapshot job, with QEMU's names (``qapi/migration.json``: MigrationStatus)."""

TARGET_PAGE_BYTES = 4096
"""The unit of QEMU's stream and of our files: the guest page size on x86."""

Backing = Literal["anonymous", "memfd", "shmem", "hugetlbfs", "file"]
"""The memory behind a RAM block: private anonymous memory, a memfd, a file on tmpfs or
hugetlbfs, or a file on a disk file system (which cannot be write-protected)."""


ProtectionKind = Literal["userfaultfd", "userfaultfd-user", "mprotect"]
"""The means of write protection: a userfaultfd, a userfaultfd for user-mode faults only, or
mprotect(2) with a SIGSEGV handler."""


FOR_ANALYSIS = "for analysis only: it has no device state, and cannot be restored"
"""The note on a snapshot for analysis, the same everywhere."""


class RamBlock(msgspec.Struct, frozen=True, kw_only=True):
    """One contiguous piece of guest RAM (QEMU ``include/exec/ramblock.h``).

    ``hva``: host virtual address in the VMM's address space, bytes.
    ``used_length_bytes``: what goes into the stream; ``max_length_bytes``: what is mapped.
    ``page_size_bytes``: the host page size behind the block (4096, or a hugetlb size).
    ``shared``: mapped MAP_SHARED in the VMM.
    ``backing_fd``: the VMM's fd number of the memfd or file behind the block, or None.
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
        """Number of pages of ``page_size_bytes`` in the used length, rounded up."""
        return -(-self.used_length_bytes // self.page_size_bytes)


class BlockRecord(msgspec.Struct, frozen=True, kw_only=True):
    """A RAM block in the manifest: what a reader of the snapshot needs."""

    idstr: str
    used_length_bytes: int
    page_size_bytes: int


class GpaRange(msgspec.Struct, frozen=True, kw_only=True):
    """One run of guest-physical addresses that maps a part of a RAM block."""

    gpa: int
    length_bytes: int
    idstr: str
    offset_bytes: int


class Downtime(msgspec.Struct, frozen=True, kw_only=True):
    """Parts of the downtime, milliseconds, monotonic clock of the snapshotter.

    ``stop_ms``: until the vCPUs stood still; ``drain_ms``: from then until QEMU's ``stop`` had
    completed and flushed the requests in flight.
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
    """Pages of the snapshot by class, in target pages (4096 bytes on x86).

    ``total == zero + data + unchanged``; ``faulted`` is a part of ``total``, ``never_populated`` a
    part of ``zero``, counted before an increment drops pages that were zero in the parent, too.
    ``unchanged``: in an increment, pages that equal the parent's, so are not in the file.
    """

    total: int = 0
    zero: int = 0
    data: int = 0
    faulted: int = 0
    never_populated: int = 0
    unchanged: int = 0


class StoppedWrite(msgspec.Struct, frozen=True, kw_only=True):
    """Guest RAM that the VMM itself wrote between stop and cont (invariant 8)."""

    idstr: str
    offset_bytes: int
    length_bytes: int


class Statistics(msgspec.Struct, frozen=True, kw_only=True):
    """A snapshot job's numbers: progress while it runs, the result at its end.

    Sizes in bytes, times in milliseconds or microseconds as named, all monotonic.
    ``stall_ms``: total time that faults waited because the spill was full.
    ``rate_bytes_per_s``: written to the destination over the last seconds, 0.0 in the first second.
    ``protection``: the means of write protection; None without (``--mode stop``).
    ``eta_s``: seconds until RAM is saved at the current rate; None if unknown.
    ``disks``: what the job does with the VM's disks, and the cost, in words; empty without disks.
    ``disk_bytes``, ``disk_done_bytes``: size and progress of the disk copies, as far as known.
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

    ``driver``: protocol driver (``file``, ``host_device``, ``nbd``, ...). ``format``: ``raw``,
    ``qcow2``, ... ``filename``: path, or QEMU's name for it. ``size_bytes``: as the guest sees it.
    """

    node_name: str
    driver: str
    format: str
    filename: str
    read_only: bool
    size_bytes: int


class DiskRecord(msgspec.Struct, frozen=True, kw_only=True):
    """A block device of the VM at the instant, from its live block graph.

    ``device``: its drive id; ``qdev``: QOM path of the device that the guest sees. ``filename``
    and ``driver``: file and format of the topmost image that has a name; empty without a medium.
    ``images``: the backing chain, topmost image first.
    ``temporary``: the topmost image is a nameless file (``snapshot=on``) that ends with the VM.
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
    """A small text file on the host that the command line refers to."""

    path: str
    text: str


class DomainRecord(msgspec.Struct, frozen=True, kw_only=True):
    """The libvirt domain of a machine.

    ``xml``: the migratable XML with secrets, as ``virsh save`` stores it. ``live_xml``: the running
    domain's XML, for its ``<cpu>``.
    """

    uri: str
    uuid: str
    xml: str
    live_xml: str


class HostCpu(msgspec.Struct, frozen=True, kw_only=True):
    """A host's CPU as ``/proc/cpuinfo`` describes it; ``flags`` are separated by blanks."""

    vendor: str
    family: str
    model: str
    name: str
    flags: str


class MachineRecord(msgspec.Struct, frozen=True, kw_only=True):
    """The machine that a snapshot was taken of, with enough detail to start it again.

    ``argv``: the recorded command line; data, never passed to a shell. ``command_line``: a command
    line with the devices and media of the instant; empty if ``argv`` is. ``cwd``: the directory
    that relative paths in both refer to. ``config_files``: what ``-readconfig`` read.
    ``differences``: what ``command_line`` does not express of the running VM, each with its name.
    ``cpu_ties``: why the guest can only continue on a CPU like ``host_cpu``; usually empty.
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
    """A file that belongs to a captured disk; a restore must find it exactly like this.

    ``path``: relative to the snapshot's directory, or absolute. ``size_bytes``: the file's size.
    ``mtime_ns``: 0 for a block device. ``head``: BLAKE3 of the first MiB, hex.
    ``digest``: BLAKE3 of the whole file, hex; empty if the file was never read in full.
    """

    path: str
    format: str
    size_bytes: int
    mtime_ns: int
    head: str
    digest: str = ""

    @property
    def name_beside(self) -> str:
        """The file's name if it lies in the snapshot's own ``NAME.disks`` directory (whatever the
        snapshot is called by now); else empty."""
        head, beside, name = self.path.partition(".disks/")
        ours = beside and "/" not in head + name and not name.startswith(".")
        return name if ours else ""


class CapturedDisk(msgspec.Struct, frozen=True, kw_only=True):
    """A disk's content at the instant.

    ``device``, ``qdev``, ``node_name``: as in :class:`DiskRecord`. ``kind``: ``copy``, or
    ``overlay``: the image is frozen, and the VM has written to ``overlay`` above it since.
    ``files``: the image's backing chain, topmost first. Nothing may write to these files.
    """

    device: str
    qdev: str
    node_name: str
    kind: Literal["copy", "overlay"]
    virtual_size_bytes: int
    files: tuple[FrozenFile, ...]
    overlay: str = ""


class ParentRecord(msgspec.Struct, frozen=True, kw_only=True):
    """The parent of an increment: its content id (64 hexadecimal digits), and where its file was
    (absolute; empty if it had no name)."""

    id: str
    path: str = ""


class Manifest(msgspec.Struct, frozen=True, kw_only=True):
    """The readable part of a snapshot file (docs/reference/file-format.md).

    ``format``: 1; 2 for an increment, which has a ``parent``.
    ``created``: wall clock, RFC 3339, UTC. ``mode``: how the snapshot was made.
    ``stream_bytes``: length of the decompressed payload.
    ``for_analysis``: RAM only, no device state: the snapshot cannot be restored.
    ``mark``: proof that this user took it on this host, or empty (still/host_mark.py).
    ``captured_disks``: the disks of this instant. ``without_disks``: writable disks that are not in
    the snapshot, by the names that users know. ``quiesced``: the guest agent had frozen the file
    systems, so a loader must have them thawed. ``whole_of``: id of the increment that this is the
    whole form of. ``page_origins``: which pages were never populated, and which a fault saved
    (still/page_origins.py); empty if not recorded.
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
