"""The public functions of Stillframe, in one place.

Importing this module imports every room except the board; ``stillframe`` and the command line
defer that to the first call. Optional dependencies (libvirt, obstore, cryptography, the board)
are imported by the room that needs them, at the time of use.
"""

from __future__ import annotations

import contextlib
import os
import threading
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Final

from stillframe.disks.folding import Fold
from stillframe.disks.point_in_time import DEFAULT_MAX_DRAIN_MS, DiskOptions
from stillframe.disks.refusals import DISKS, DiskKind
from stillframe.doctor.checks import Check, CheckStatus
from stillframe.doctor.host import host_checks
from stillframe.doctor.survey import SurveyedVm, survey
from stillframe.doctor.vm import vm_checks
from stillframe.errors import HostError, UsageError, check_choice
from stillframe.image.cached import ImageCache
from stillframe.image.keeping import ImageKeeping
from stillframe.image.store_image import store_image
from stillframe.image.stored import StoredImage
from stillframe.machine import Blocker, Machine
from stillframe.machine.finding import connect, list_vms
from stillframe.machine.process.machine import ProcessMachine
from stillframe.machine.process.vm_info import VmInfo
from stillframe.model import Statistics
from stillframe.restore import adoption, plan, store_use, take_restored
from stillframe.restore.clones import CloneKind
from stillframe.restore.complete_image import find_complete, on_complete
from stillframe.restore.domain_plan import DomainPlan
from stillframe.restore.fork import fork
from stillframe.restore.planners import Clock
from stillframe.restore.records import RestorePlan
from stillframe.restore.restore_domain import RestoredDomain, plan_restore_domain, restore_domain
from stillframe.restore.restored import RestoredVm, kill
from stillframe.restore.show import plan_lines
from stillframe.restore.start import restore
from stillframe.snapshot import taking, watching
from stillframe.snapshot.committing import commit
from stillframe.snapshot.into_store import Save
from stillframe.snapshot.job import SnapshotJob
from stillframe.snapshot.options import (
    DEFAULT_SPILL_BYTES,
    MODES,
    Mode,
    SnapshotOptions,
    choose_adaptive_level,
)
from stillframe.snapshot.take import take_snapshot
from stillframe.snapshot.taken import TakenSnapshot
from stillframe.snapshot.watching import Follower
from stillframe.still import import_stream as importing
from stillframe.still.diff import SnapshotDiff, diff_snapshots
from stillframe.still.export import EXPORT_FORMATS, ExportFormat, check_export, export_snapshot
from stillframe.still.frames import COMPRESSIONS, Compression, choose_level
from stillframe.still.ram_map import RamMap, draw_ram
from stillframe.still.sealing import DataKey
from stillframe.still.sinks import Sink, aborting
from stillframe.still.snapshot import Snapshot
from stillframe.still.verify import VerifyReport
from stillframe.store import store_keys
from stillframe.store.backends.counting import counting
from stillframe.store.backends.local import write_file
from stillframe.store.backends.local_source import open_stream
from stillframe.store.backends.pipe import standard_output
from stillframe.store.check import CheckReport, check_share, check_store
from stillframe.store.copying import Copied, copy_snapshots
from stillframe.store.importing import import_into_store
from stillframe.store.keys import Keys, make_key, wrapped_for
from stillframe.store.listing import ListedSnapshot, listing
from stillframe.store.locations import Location as StrPath
from stillframe.store.locations import absolute, open_sink
from stillframe.store.named import as_store, locate
from stillframe.store.named import open_named as open  # noqa: A004 - as gzip.open
from stillframe.store.opening import make_store as init
from stillframe.store.opening import open_backend, open_store, read_config, repaired_config
from stillframe.store.records import Entry
from stillframe.store.removing import Removal
from stillframe.store.repair import Repair, repair_store
from stillframe.store.retention import Policy
from stillframe.store.store import Compaction, Pruning, Store
from stillframe.store.store_keys import StoreKey
from stillframe.version import __version__
from stillframe.vmstate.source import Source

# fmt: off
__all__ = [
    "COMPRESSIONS", "DEFAULT_EVERY_S", "DEFAULT_MAX_DRAIN_MS", "DEFAULT_SPILL_BYTES", "DISKS",
    "EXPORT_FORMATS", "MODES", "Blocker", "Check", "CheckReport", "CheckStatus", "Clock",
    "CloneKind", "Compaction", "Compression", "Copied", "DataKey", "DiskKind", "DomainPlan",
    "ExportFormat", "Fold", "Follower", "Keys", "ListedSnapshot", "Machine", "Mode",
    "ProcessMachine", "Pruning", "RamMap", "Removal", "Repair", "RestorePlan", "RestoredDomain",
    "RestoredVm", "Sink", "Snapshot", "SnapshotDiff", "SnapshotJob", "Source", "Statistics",
    "Store", "StoreKey", "StoredImage", "StrPath", "SurveyedVm", "TakenSnapshot", "VerifyReport",
    "VmInfo", "add_image", "add_key", "check", "commit", "connect", "copy", "diff", "doctor",
    "draw_ram", "export", "fork", "image_limit", "images", "import_stream", "init", "kill",
    "list_keys", "list_vms", "locate", "ls", "make_key", "open", "open_store", "plan_lines",
    "plan_restore", "plan_restore_domain", "prune", "remove_key", "repair", "restore",
    "restore_domain", "rm", "rm_images", "standard_output", "survey", "tag", "take", "verify",
    "watch", "write_file",
]
# fmt: on

DEFAULT_EVERY_S: Final = 600.0


def doctor(vm: str | int | None = None, *, directory: StrPath = ".") -> list[Check]:
    """Check what this host, and one VM, lack for snapshots; every check carries a remedy.

    The host check is a real trial: it attaches to a small process of ours as it would to a VM.
    The guest of ``vm`` is not touched.

    Args:
        directory: where snapshots would go; its free space is checked.

    Raises:
        NotFoundError, UsageError: there is no such VM. Every other obstacle is in the list.
    """
    if vm is None:
        return host_checks(Path(directory))
    seen = vm_checks(str(vm))
    return [*host_checks(Path(directory), vmm=seen.vmm), *seen.checks]


def take(
    vm: str | int | Machine,
    output: StrPath | Sink | None = None,
    *,
    store: StrPath | Store | None = None,
    tags: Sequence[str] = (),
    full: bool = False,
    compression: Compression = "zstd",
    level: int | None = None,
    spill_bytes: int = DEFAULT_SPILL_BYTES,
    max_bandwidth_bytes_per_s: int | None = None,
    mode: Mode = "background",
    arm: bool = True,
    for_analysis: bool = False,
    parent: StrPath | Snapshot | None = None,
    disks: DiskKind = "copy",
    disks_directory: StrPath | None = None,
    max_drain_ms: float = DEFAULT_MAX_DRAIN_MS,
    quiesce: bool = False,
    libvirt_snapshot: str | None = None,
    image: bool = False,
    key: DataKey | None = None,
    keys: Keys | None = None,
    overwrite: bool = False,
    on_progress: Callable[[Statistics], None] | None = None,
) -> SnapshotJob:
    """Start a snapshot of a running VM and return at once; the job's own thread does the work.

    If the VM was restored and its image is still being filled, the job waits for that first.

    The destination is opened before the VM is touched. However the job ends, the guest runs
    afterwards (if it ran before) and nothing of ours is left in it.

    Args:
        vm: as for :func:`connect`; or a machine, which the caller still has to close.
        output: the file to create (mode 0600, under its name only once it is complete), the URL
            of an object, or a sink. None: the snapshot goes into a store, with its disks.
        store: which store, as for :func:`open_store`. tags: the snapshot's tags there.
        level: zstd level, -50 to 19; None adapts the level during the job, so that the snapshot
            is durable soonest. Not with ``compression="none"``.
        spill_bytes: most memory for pages that the guest overwrites before they are written out.
        max_bandwidth_bytes_per_s: limit on the write rate; None is unlimited.
        mode: ``background``, or ``stop`` to keep the guest stopped while RAM is saved.
        arm: write-protect RAM before the stop, so that the downtime does not grow with RAM.
        for_analysis: save RAM only, without device state; this works even if a device cannot be
            saved. Such a snapshot cannot be restored.
        full: save all of RAM. By default, if the store has a snapshot of the VM, only what changed
            since is saved, until the chain reaches the store's length limit.
        parent: an earlier snapshot: save only what changed since. For its clones (:func:`fork`)
            the changed pages are known at no cost; for other VMs all of RAM is read and compared.
        disks: for QEMU: ``copy`` the writable disks as of the instant, while the guest runs;
            ``overlay``: freeze them and let the VM write to overlays until :func:`commit`;
            ``none``: leave the disks out, and say so in the snapshot.
        disks_directory: for copies and overlays; by default copies go to ``OUTPUT.disks`` and
            overlays beside their images.
        max_drain_ms: longest time that the guest may stand still for disk requests in flight.
        quiesce: have the guest agent freeze the file systems around the instant.
        libvirt_snapshot: for a domain of libvirt 9.9 or newer: register the snapshot with libvirt
            under this name, for ``virsh snapshot-revert``. Needs a save image, ``OUTPUT.save``.
        image: also keep a complete image, made in the same pass: VMs map it, and nothing has to be
            filled (:func:`images`). If that fails, a note says so.
        key: from :func:`make_key`: encrypt the file. Disk copies are not encrypted.
        keys: for an encrypted parent.
        overwrite: replace an existing file.
        on_progress: called from the job's thread about ten times a second; must be quick.

    Returns:
        The job: ``wait()``, ``cancel()``, ``stats``, or ``await job``. ``wait`` raises
        NotFoundError, UsageError, BusyError, HostError, RefusedError (the VM was not touched),
        MachineError, SinkError, SnapshotFailed or SnapshotCancelled; ``guest_state`` says what
        the guest does afterwards.

    Raises:
        UsageError: the options make no sense, or the file exists.
        NotFoundError: there is no store.
        SinkError: the destination may not be written to.
    """
    options = SnapshotOptions(
        compression_level=choose_adaptive_level(compression, level),
        spill_bytes=spill_bytes,
        max_bandwidth_bytes_per_s=max_bandwidth_bytes_per_s,
        mode=mode,
        arm=arm,
        for_analysis=for_analysis,
        key=key,
        disks=DiskOptions(
            kind=disks,
            directory=None if disks_directory is None else os.fspath(disks_directory),
            max_drain_ms=max_drain_ms,
            quiesce=quiesce,
        ),
    )
    save: Save = take_snapshot
    keeping = ImageKeeping(ImageCache()) if image else None
    if keeping is not None:
        save = keeping.save
    if libvirt_snapshot is not None:
        if keeping is not None:
            raise UsageError("--image and --libvirt-snapshot do not go together")
        save = adoption.save_as(libvirt_snapshot, output, key)
    return taking.begin_take(
        vm,
        output,
        options,
        origins=take_restored,
        store=store,
        tags=tags,
        full=full,
        parent=parent,
        keys=keys,
        overwrite=overwrite,
        save=save,
        keeping=keeping,
        on_progress=on_progress,
    )


def watch(
    vm: str | int,
    *,
    every_s: float = DEFAULT_EVERY_S,
    count: int | None = None,
    store: StrPath | Store | None = None,
    keys: Keys | None = None,
    keep_last: int = 0,
    keep_hourly: int = 0,
    keep_daily: int = 0,
    keep_weekly: int = 0,
    keep_monthly: int = 0,
    keep_yearly: int = 0,
    keep_within_s: float = 0.0,
    keep_tags: Sequence[str] = (),
    compression: Compression = "zstd",
    level: int | None = None,
    spill_bytes: int = DEFAULT_SPILL_BYTES,
    disks: DiskKind = "copy",
    max_drain_ms: float = DEFAULT_MAX_DRAIN_MS,
    most_away_s: float | None = None,
    stop: threading.Event | None = None,
    follower: Follower | None = None,
) -> int:
    """Keep a VM armed and take snapshots of it into a store on a schedule; each snapshot but the
    first costs only what the guest wrote since the previous one.

    Return when ``stop`` is set or ``count`` is reached. The guest then runs unprotected, as it
    does if this process dies. If a snapshot fails, the follower is told and the watch goes on. A VM
    has one watch at most, and nothing else can snapshot it meanwhile.

    Args:
        vm: as for :func:`connect`; a VM that is given by name may exit and come back.
        every_s: seconds from the start of one snapshot to the start of the next.
        count: end after this many snapshots; None: never.
        store: as for :func:`open_store`; keys: for an encrypted store.
        keep_last: and the other ``keep_`` arguments: as for :func:`prune`, applied after each
            snapshot; without any, nothing is removed. Long chains are compacted in the background,
            unless the store is append-only.
        compression: and level, spill_bytes, disks, max_drain_ms: as for :func:`take`; overlays
            would pile up, so ``disks`` is ``copy`` or ``none``.
        most_away_s: how long the VM may be away after its first snapshot; None: no limit.
        follower: receives the watch's events.

    Returns:
        The number of snapshots taken.

    Raises:
        UsageError: the options make no sense. NotFoundError: there is no store, or no such VM.
        RefusedError: the VM's RAM could change unseen. Otherwise as the first :func:`take`, or
        because the VM was away for too long.
    """
    check_choice("disks", disks, ("copy", "none"))
    options = SnapshotOptions(
        compression_level=choose_adaptive_level(compression, level),
        spill_bytes=spill_bytes,
        disks=DiskOptions(kind=disks, max_drain_ms=max_drain_ms),
    )
    policy: Policy | None = Policy(
        last=keep_last,
        hourly=keep_hourly,
        daily=keep_daily,
        weekly=keep_weekly,
        monthly=keep_monthly,
        yearly=keep_yearly,
        within_s=keep_within_s,
        tags=tuple(keep_tags),
    )
    if policy == Policy():
        policy = None
    into = as_store(store, keys)

    def prune_vm(name: str) -> None:
        if policy is not None:
            needed = store_use.vms_that_need(into)
            done = into.prune(policy, vms=[name], needed_by=needed, compacts=False)
            _forget_images(done.removed)

    return watching.watch(
        vm,
        into,
        options,
        origins=take_restored,
        prune=prune_vm,
        compact=lambda name, stopped: into.compact(policy, vms=[name], stopped=stopped),
        every_s=every_s,
        count=count,
        most_away_s=most_away_s,
        stop=stop,
        follower=follower,
    )


def verify(
    path: StrPath,
    *,
    keys: Keys | None = None,
    progress: Callable[[int, int], None] | None = None,
) -> VerifyReport:
    """Check every digest of a snapshot file, and that its stream parses to the end.

    Args:
        keys: for an encrypted snapshot.
        progress: called with (bytes of the stream done, total bytes).

    Raises:
        DataError: the file is damaged; the error names the place. Otherwise as :func:`open`.
    """
    with open(path, keys=keys) as snapshot:
        return snapshot.verify(progress=progress)


def diff(a: StrPath, b: StrPath, *, keys: Keys | None = None) -> SnapshotDiff:
    """Compare two snapshots: pages by block and region, devices field by field.

    If b is an increment on a, only the pages written since a are read.

    Args:
        keys: for encrypted snapshots.

    Raises:
        UsageError: their page sizes differ. DataError: one is damaged. Otherwise as :func:`open`.
    """
    with open(a, keys=keys) as first, open(b, keys=keys) as second:
        return diff_snapshots(first, second)


def export(
    path: StrPath,
    output: StrPath | Sink,
    *,
    format: ExportFormat,  # noqa: A002 - the command line's word
    block: str | None = None,
    keys: Keys | None = None,
    overwrite: bool = False,
    progress: Callable[[int], None] | None = None,
) -> None:
    """Write a snapshot's content in a format that other programs read.

    Args:
        format: ``qemu``, the migration stream; ``raw``, guest-physical memory from address 0
            on, or one block; ``elf``, a core file with guest-physical segments and vCPUs;
            ``libvirt``, a save image for ``virsh restore``; ``libvirt-zstd``, a compressed save
            image, for libvirt 10.4 on; ``still``, an increment and its parents merged into one
            whole snapshot.
        block: only with ``raw``: the block to write.
        keys: for an encrypted snapshot; of the formats, only ``still`` stays encrypted.
        progress: called with the bytes written so far.

    Raises:
        UsageError: the arguments do not go together, or the file exists.
        NotFoundError: no such block. SinkError: the destination cannot be written.
        DataError: the snapshot is damaged. Otherwise as :func:`open`.
    """
    check_export(format, block)
    own_key = (keys or Keys()).with_slots
    with open(path, keys=keys) as snapshot:
        sink = open_sink(output, overwrite=overwrite)
        if progress is not None:
            sink = counting(sink, progress)
        with aborting(sink):
            export_snapshot(snapshot, sink, format, block=block, own_key=own_key)


def import_stream(
    source: StrPath | Source,
    output: StrPath | Sink | None = None,
    *,
    store: StrPath | Store | None = None,
    tags: Sequence[str] = (),
    compression: Compression = "zstd",
    level: int | None = None,
    key: DataKey | None = None,
    keys: Keys | None = None,
    overwrite: bool = False,
    progress: Callable[[int], None] | None = None,
) -> str:
    """Turn a QEMU migration stream into a snapshot; return its id.

    Args:
        source: a file, or anything open for reading bytes (a pipe, standard input).
        output: the file to create, or a sink. None: the snapshot goes into a store, under the VM
            name ``import``, because a stream does not contain its VM's name.
        store: which store, as for :func:`open_store`, with ``keys``. tags: the snapshot's tags.
        key: from :func:`make_key`: encrypt the file.
        progress: called with the bytes of the stream read so far.

    Raises:
        NotFoundError, HostError: there is no such stream, or it may not be read.
        SinkError: the destination cannot be written.
        DataError: the stream is damaged, or does not hold a whole VM.
        UsageError: the options make no sense, or the file exists.
    """
    encoded = choose_level(compression, level)
    if output is not None and tags:
        raise UsageError("only a store has tags", remedy="leave -o out")
    with open_stream(source) as stream:
        if output is None:
            return import_into_store(
                stream,
                as_store(store, keys),
                stillframe_version=__version__,
                level=encoded,
                key=key,
                tags=tags,
                progress=progress,
            )
        sink = open_sink(output, overwrite=overwrite)
        with aborting(sink):
            return importing.import_stream(
                stream,
                sink,
                stillframe_version=__version__,
                level=encoded,
                key=key,
                progress=progress,
            )


def plan_restore(
    path: StrPath,
    *,
    name: str | None = None,
    qmp_socket: str | None = None,
    extra_args: Sequence[str] = (),
    program: str | None = None,
    paused: bool = False,
    clock: Clock = "host",
    stream: bool = False,
    fill: bool = False,
    keys: Keys | None = None,
) -> RestorePlan:
    """Plan a restore: what would be started, and what that would touch. Nothing is made or started.

    Arguments and errors are those of :func:`restore`, which carries out such a plan.
    """
    with open(path, keys=keys) as snapshot:
        planned = plan.plan_restore(
            snapshot,
            name=name,
            qmp_socket=qmp_socket,
            extra_args=extra_args,
            program=program,
            paused=paused,
            clock=clock,
            stream=stream,
        )
        complete = None if fill else find_complete([planned], snapshot)
        if complete is not None:
            with contextlib.closing(complete):
                (planned,) = on_complete([planned], complete)
        return planned


def ls(
    *vms: str, store: StrPath | Store | None = None, keys: Keys | None = None
) -> list[ListedSnapshot]:
    """List a store's snapshots, of the given VMs or of all: grouped by VM, oldest first.

    Raises:
        NotFoundError: there is no store. HostError: not permitted.
    """
    return listing(as_store(store, keys).catalog(), vms)


def rm(
    *names: str,
    store: StrPath | Store | None = None,
    keys: Keys | None = None,
    dry_run: bool = False,
) -> Removal:
    """Remove snapshots from a store, with their disks: either all of them or none.

    Raises:
        NotFoundError, UsageError: as :func:`locate`.
        RefusedError: another snapshot or a VM needs one of them, or the store is append-only.
        DataError: the catalog is damaged. SinkError: not permitted.
    """
    found = as_store(store, keys)
    entries = list({entry.id: entry for entry in map(found.find, names)}.values())
    removal = found.remove(entries, needed_by=store_use.vms_that_need(found), dry_run=dry_run)
    if not dry_run:
        _forget_images(removal.removed)
    return removal


def tag(
    name: str,
    *tags: str,
    remove: Sequence[str] = (),
    store: StrPath | Store | None = None,
    keys: Keys | None = None,
) -> tuple[str, ...]:
    """Add tags to a snapshot in a store, remove others, and return the resulting tags.

    Raises:
        NotFoundError, UsageError: as :func:`locate`; or a tag's name is not valid.
        RefusedError: ``remove`` is given, and the store is append-only.
    """
    found = as_store(store, keys)
    entry = found.find(name)
    found.tag(entry, tags, drop=remove)
    return found.catalog().tags.get(entry.id, ())


def prune(
    *vms: str,
    keep_last: int = 0,
    keep_hourly: int = 0,
    keep_daily: int = 0,
    keep_weekly: int = 0,
    keep_monthly: int = 0,
    keep_yearly: int = 0,
    keep_within_s: float = 0.0,
    keep_tags: Sequence[str] = (),
    store: StrPath | Store | None = None,
    keys: Keys | None = None,
    dry_run: bool = False,
) -> Pruning:
    """Remove the snapshots that a policy does not keep, for each VM separately; -1 keeps all.

    A snapshot that a kept one or a VM needs stays. Long chains are compacted first.

    Raises:
        UsageError: nothing would be kept. NotFoundError: there is no store, or no such VM in it.
        RefusedError: the store is append-only. Otherwise as :func:`rm`.
    """
    found = as_store(store, keys)
    policy = Policy(
        last=keep_last,
        hourly=keep_hourly,
        daily=keep_daily,
        weekly=keep_weekly,
        monthly=keep_monthly,
        yearly=keep_yearly,
        within_s=keep_within_s,
        tags=tuple(keep_tags),
    )
    needed_by = store_use.vms_that_need(found)
    pruning = found.prune(policy, vms=vms, needed_by=needed_by, dry_run=dry_run)
    if not dry_run:
        _forget_images(pruning.removed)
    return pruning


def copy(
    *names: str,
    to: StrPath | Store,
    store: StrPath | Store | None = None,
    keys: Keys | None = None,
    dry_run: bool = False,
    progress: Callable[[int, int], None] | None = None,
) -> Copied:
    """Copy snapshots into another store, with their disks and tags: all, or the named ones with
    their parents. What the other store already has is not sent again, so repeating the call after a
    failure resumes the copy.

    Args:
        to: the other store.
        progress: called with (bytes done, total bytes).

    Raises:
        NotFoundError, UsageError: as :func:`locate`; a store or a file is gone.
        DataError: a snapshot is damaged. HostError: not permitted, or a bucket cannot be reached.
        SinkError: the other store is full, or cannot be reached.
    """
    found, other = as_store(store, keys), as_store(to, keys)
    entries = [*map(found.find, names)] if names else found.list()
    return copy_snapshots(found, other, entries, dry_run=dry_run, on_progress=progress)


def check(
    *,
    store: StrPath | Store | None = None,
    keys: Keys | None = None,
    read_data: float = 0.0,
    progress: Callable[[int, int], None] | None = None,
) -> CheckReport:
    """Check a store: structure, digests, chains, leftovers. Nothing is changed.

    Args:
        read_data: the share of the data to read, 0 to 1; 1 finds every damaged byte.
        progress: called with (bytes done, total bytes).

    Raises:
        NotFoundError: there is no store. DataError: its configuration is damaged.
    """
    found = as_store(store, keys)
    return check_store(found.backend, read_data=read_data, progress=progress)


def repair(
    *,
    store: StrPath | Store | None = None,
    keys: Keys | None = None,
    read_data: float = 0.0,
    forget: bool = False,
    progress: Callable[[int, int], None] | None = None,
) -> Repair:
    """Repair a store: rebuild the catalog from the snapshots, and clean up after dead processes.

    Args:
        read_data: the share of the data to read, 0 to 1, to find what is lost.
        forget: also remove damaged snapshots, except those that a sound one, or a VM, needs.

    Raises:
        NotFoundError: there is no store. SinkError: not permitted.
        RefusedError: ``forget``, and the store is append-only.
    """
    check_share(read_data)
    done: Sequence[str] = ()
    if store is None or isinstance(store, str | os.PathLike):
        store, done = repaired_config(store, keys)
    return repair_store(
        store,
        read_data=read_data,
        forget=forget,
        needed_by=store_use.vms_that_need(store),
        already_done=done,
        progress=progress,
    )


def images() -> list[StoredImage]:
    """List this user's complete images of snapshots on this host, most recently used first.

    Raises:
        HostError: not permitted.
    """
    return ImageCache().images()


def add_image(
    path: StrPath,
    *,
    keys: Keys | None = None,
    progress: Callable[[int, int], None] | None = None,
) -> StoredImage:
    """Make the complete image of a snapshot, unless there is one: :func:`restore` and :func:`fork`
    start VMs on it, with nothing to read, check or decompress.

    Args:
        progress: called with (bytes done, total bytes).

    Raises:
        RefusedError: the snapshot is encrypted, or the image does not fit into the limit.
        DataError: the snapshot is damaged. SinkError: the cache's disk is full.
        Otherwise as :func:`open`.
    """
    cache = ImageCache()
    with open(path, keys=keys) as snapshot:
        store_image(cache, snapshot, absolute(snapshot.description), progress)
        return cache.find(snapshot.id)


def rm_images(*names: str) -> list[StoredImage]:
    """Remove complete images; their snapshots stay. If one is not found or in use, remove none.

    Args:
        names: ids of snapshots, or prefixes of ids.

    Raises:
        NotFoundError, UsageError: a name matches no image, or several. BusyError: VMs run on one.
    """
    cache = ImageCache()
    cache.sweep()
    found = list({one.id: one for one in map(cache.find, names)}.values())
    for one in sorted(found, key=lambda one: not one.in_use):
        cache.remove(one.id)
    return found


def image_limit(limit_bytes: int | None = None) -> int:
    """Return, and optionally set, the limit on the disk space of all complete images, bytes.

    Eviction takes the least recently used images first, and never one that VMs run on.

    Args:
        limit_bytes: the new limit; None leaves it as it is.

    Raises:
        UsageError, SinkError: the limit makes no sense, or cannot be stored.
    """
    cache = ImageCache()
    if limit_bytes is not None:
        cache.set_limit(limit_bytes)
    return cache.limit_bytes


def _forget_images(removed: Sequence[Entry]) -> None:
    """Remove the complete images of removed snapshots: their RAM must be gone, too."""
    with contextlib.suppress(HostError):
        cache = ImageCache()
        cache.sweep()
        cache.forget([entry.id for entry in removed])


def list_keys(store: StrPath | None = None) -> list[StoreKey]:
    """List the keys that open an encrypted store; this needs none of them.

    Raises:
        NotFoundError: there is no store.
    """
    backend = open_backend(store)
    read_config(backend)
    return store_keys.list_keys(backend)


def add_key(
    store: Store,
    *,
    passphrase: str | None = None,
    recipients: Sequence[str] = (),
    label: str = "",
) -> list[StoreKey]:
    """Add a key to an encrypted store: a passphrase or recipients.

    Raises:
        UsageError: the store is not encrypted; or as :func:`make_key`. SinkError: not permitted.
    """
    if store.key is None:
        raise UsageError(
            f"the store {store.description} is not encrypted",
            remedy="'stillframe init --encrypt' makes one that is",
        )
    key = wrapped_for(store.key, passphrase=passphrase, recipients=recipients)
    return store_keys.write_keys(store.backend, key, [label])


def remove_key(store: Store, key_id: str) -> StoreKey:
    """Remove a key from an encrypted store.

    Raises:
        NotFoundError: no key has that id. UsageError: it is the last key.
        RefusedError: the store is append-only. SinkError: not permitted.
    """
    store.check_may_remove()
    return store_keys.remove_key(store.backend, key_id)
