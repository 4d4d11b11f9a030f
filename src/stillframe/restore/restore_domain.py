"""Snapshots of libvirt domains, started as a new domain or as the same one again."""

from __future__ import annotations

import contextlib
import os
import shutil
import time
from collections.abc import Callable, Sequence
from pathlib import Path

import msgspec

from stillframe.errors import DataError, HostError, StillframeError, TrustError
from stillframe.image.filling import Filling
from stillframe.machine.libvirt.domain import SYSTEM_URI, DomainRef
from stillframe.restore.agents import thaw
from stillframe.restore.available import check_memory
from stillframe.restore.captured_disks import check_captured
from stillframe.restore.disk_copies import copy_disk
from stillframe.restore.domain_plan import DomainPlan, plan_domain
from stillframe.restore.domain_start import DomainStart
from stillframe.restore.overlays import make_overlays
from stillframe.restore.plan import check_required
from stillframe.restore.private_directories import PASSABLE, make_directory, remove
from stillframe.restore.read_right import let_read
from stillframe.restore.records import DiskOverlay, RunAs, streamed_note
from stillframe.restore.restored import (
    IMAGE_NAME,
    RestoredVm,
    domains_root,
    hand_over,
    make_lease,
    sweep_domains,
    write_vm,
)
from stillframe.restore.run_as import choose_user
from stillframe.restore.show import printable
from stillframe.restore.untouched import memory_needed_bytes
from stillframe.still.snapshot import Snapshot
from stillframe.store.keys import Keys
from stillframe.store.locations import Location, real
from stillframe.store.named import open_named
from stillframe.store.processes import start_ticks


class RestoredDomain(msgspec.Struct, frozen=True, kw_only=True):
    """A running transient domain. ``state``: ``running`` or ``paused``. ``directory``: its overlays
    and sockets; the caller removes it once the domain has ended. ``image_path``: the fill record of
    its image; None if all of RAM came before it ran. ``resident_ms``: since the restore began; None
    if nobody waited."""

    name: str
    uuid: str
    uri: str
    pid: int
    state: str
    directory: str
    notes: tuple[str, ...]
    image_path: str | None = None
    resident_ms: float | None = None


def plan_restore_domain(
    path: Location,
    *,
    name: str | None = None,
    directory: Location | None = None,
    revert: bool = False,
    keys: Keys | None = None,
    stream: bool = False,
) -> DomainPlan:
    """Plan how to start a snapshot of a libvirt domain as a new domain; nothing is created.

    Arguments and errors are those of :func:`restore_domain`, which carries out such a plan.
    """
    where = None if directory is None else Path(directory)
    with open_named(path, keys=keys) as snapshot:
        return plan_domain(snapshot, name=name, directory=where, revert=revert, stream=stream)


def restore_domain(
    path: Location,
    *,
    name: str | None = None,
    trust: bool = False,
    paused: bool = False,
    directory: Location | None = None,
    revert: bool = False,
    verify_disks: bool = False,
    keys: Keys | None = None,
    stream: bool = False,
    wait: bool = False,
    on_progress: Callable[[int, int], None] | None = None,
) -> RestoredDomain:
    """Start a new, transient libvirt domain from a snapshot; the original domain is not touched.

    Args:
        name: of the new domain; default: the old name with a suffix.
        directory: to be created for its overlays and sockets; default: the usual place.
        revert: start the same domain again instead, with its disks as they were, as overlays beside
            the snapshot. A running domain is ended first and loses what it did since; its present
            disks stay where they are. A persistent domain is redefined with the overlays.
        trust, paused, verify_disks, stream, wait, keys, on_progress: as for ``restore``.

    Raises:
        UsageError: the snapshot is not of a domain. TrustError: read the plan first.
        RefusedError: a device cannot exist twice, or the snapshot lacks a disk that is in use.
        NotFoundError, DataError: a disk is gone, or is another one; the snapshot is damaged.
        HostError, MachineError: libvirt is missing, or rejected it. Nothing is left behind.
    """
    where = None if directory is None else Path(directory)
    with open_named(path, keys=keys) as snapshot:
        return start_domain(
            plan_domain(snapshot, name=name, directory=where, revert=revert, stream=stream),
            snapshot,
            trust=trust,
            paused=paused,
            verify_disks=verify_disks,
            wait=wait,
            on_progress=on_progress,
        )


def start_domain(
    plan: DomainPlan,
    snapshot: Snapshot,
    *,
    trust: bool = False,
    paused: bool = False,
    verify_disks: bool = False,
    wait: bool = False,
    leases: Sequence[Path] = (),
    parent: str = "",
    on_progress: Callable[[int, int], None] | None = None,
) -> RestoredDomain:
    """Create the overlays and the domain; the original domain is not touched.

    To revert, end the original once all else is ready; redefine a persistent one on its new disks.

    The domain runs on an image where possible, which a separate process fills.

    Args:
        wait: until all of its RAM is there.
        leases: disk directories that it shares; killing the last VM removes them.
        parent: the running domain that the snapshot is of, if the snapshot is not kept.

    Raises:
        TrustError: read the plan first. NotFoundError: a disk is gone.
        HostError: libvirt is missing, or an overlay cannot be made.
        MachineError: libvirt's own words. DataError: the snapshot or a disk of it is damaged.
        No domain and no file is left behind, whatever is raised; but a domain that was reverted
        and runs is not ended any more.
    """
    began_s = time.monotonic()
    if plan.needs_trust and not trust:
        raise TrustError(
            f"{printable(plan.snapshot)} needs your trust",
            why="; ".join(map(printable, plan.needs_trust[:2])),
            remedy="read what it would do with --dry-run, then say --trust",
        )
    check_required(plan.touches)
    used = {disk.captured for disk in plan.overlays if disk.captured}
    notes: tuple[str, ...] = tuple(
        check_captured(snapshot.manifest, plan.snapshot, only=used, digests=verify_disks)
    )
    check_memory(memory_needed_bytes(snapshot))
    machine = snapshot.manifest.machine
    running = not paused and machine is not None and machine.guest_state == "running"
    if plan.revert:
        snapshot.verify()  # once the domain has ended, it is too late
    # The system's libvirt is root, and gives its QEMUs access to their files itself.
    run_as = choose_user(machine.uid) if machine and plan.uri != SYSTEM_URI else None
    sweep_domains()
    records = domains_root() / Path(plan.directory).name
    with contextlib.ExitStack() as on_failure:
        _make_directory(Path(plan.directory), on_failure, run_as)
        if run_as is not None:
            let_read(snapshot.manifest, plan.snapshot, used, run_as.uid)
        _make_disks(plan.overlays, run_as)
        make_directory(records)
        on_failure.callback(remove, records)
        record_path = records / IMAGE_NAME
        starting = DomainStart(plan, snapshot, running, run_as, record_path)
        on_failure.callback(starting.destroy)
        filling: Filling | None = None
        if not plan.image.streamed:
            try:
                filling = starting.on_image()
            except DataError:
                raise
            except StillframeError as error:
                # If the image is not to blame, the stream fails again below.
                notes = (*notes, streamed_note(str(error)))
        if filling is None:
            starting.by_stream(on_progress)
        if plan.revert:  # from now on, the domain and its definition use these disks
            on_failure.pop_all()
            on_failure.callback(remove, records)
        domain = RestoredDomain(
            name=plan.name,
            uuid=plan.uuid,
            uri=plan.uri,
            pid=starting.find_pid(),
            state="running" if starting.runs else "paused",
            directory=plan.directory,
            notes=(*plan.notes, *notes),
            image_path=None if filling is None else str(record_path),
        )
        # Before another process fills.
        lent = tuple(str(make_lease(directory, plan.directory)) for directory in leases)
        vm = _as_vm(domain, plan.snapshot, records, lent, keeps_disks=plan.revert, parent=parent)
        vm = msgspec.structs.replace(vm, began_s=began_s)
        write_vm(vm)
        resident_ms: float | None = None
        if filling is None or not _filled_by_another(filling, record_path, on_failure, wait=wait):
            resident_ms = (time.monotonic() - began_s) * 1000
        on_failure.pop_all()
    if snapshot.manifest.quiesced:
        (vm,) = thaw([vm])
    return msgspec.structs.replace(domain, notes=vm.notes, resident_ms=resident_ms)


def _filled_by_another(
    filling: Filling, record_path: Path, on_failure: contextlib.ExitStack, *, wait: bool
) -> bool:
    """Return True if another process fills the image from now on, False once it is complete."""
    on_failure.callback(filling.close, keeps_working_set=False)
    if not wait:
        with contextlib.suppress(HostError):  # then this process fills
            hand_over(filling, record_path)
            return True
    filling.wait()
    return False


def _as_vm(
    domain: RestoredDomain,
    snapshot: str,
    records: Path,
    leases: tuple[str, ...],
    *,
    keeps_disks: bool,
    parent: str,
) -> RestoredVm:
    """Return the domain's record for ``ps`` and ``kill``.

    Args:
        keeps_disks: the disks stay after it has ended: it is the domain that it was before.
    """
    return RestoredVm(
        pid=domain.pid,
        started=start_ticks(domain.pid),
        name=domain.name,
        snapshot="" if parent else real(snapshot),
        parent=parent,
        state=domain.state,
        qmp_address=f"libvirt:{domain.uuid}",
        log_path="",
        directory=str(records),
        disk_directory=None if keeps_disks else domain.directory,
        sockets=(),
        argv=(),
        notes=domain.notes,
        image_path=domain.image_path,
        leases=leases,
        domain=DomainRef(uri=domain.uri, uuid=domain.uuid),
    )


def _make_directory(
    directory: Path, on_failure: contextlib.ExitStack, run_as: RunAs | None
) -> None:
    try:
        for above in (directory.parent.parent, directory.parent):
            if not above.is_dir():
                above.mkdir(mode=0o700, parents=True, exist_ok=True)
            if above.name in ("stillframe", "restored"):
                above.chmod(PASSABLE)
        directory.mkdir(mode=PASSABLE)
        if run_as is not None:
            os.chown(directory, run_as.uid, run_as.gid)
    except OSError as error:
        raise HostError(f"cannot make the directory {directory}", why=error.strerror) from error
    on_failure.callback(shutil.rmtree, directory, ignore_errors=True)


def _make_disks(overlays: tuple[DiskOverlay, ...], run_as: RunAs | None) -> None:
    make_overlays([disk for disk in overlays if disk.kind == "overlay"], run_as)
    for disk in overlays:
        if disk.kind == "copy":
            copy_disk(disk.base, disk.overlay)
            if run_as is not None:
                os.chown(disk.overlay, run_as.uid, run_as.gid)
