"""The adoption of a finished domain snapshot by libvirt: ``virsh snapshot-list`` shows it, and
``virsh snapshot-revert`` goes back to it (libvirt 9.9 and newer).

libvirt gets an external snapshot's description (VIR_DOMAIN_SNAPSHOT_CREATE_REDEFINE): the memory is
a save image beside the snapshot file, and the disks of its ``<domain>`` are the copies. A revert
lays new overlays over those (libvirt ``src/qemu/qemu_snapshot.c``:
qemuSnapshotRevertExternalPrepare), so they are never written to. The running domain does not
change, and its downtime does not grow.
"""

from __future__ import annotations

import contextlib
import os
import time
from pathlib import Path
from xml.etree.ElementTree import Element, SubElement, tostring

import msgspec

from stillframe.errors import HostError, RefusedError, UsageError
from stillframe.machine import Machine
from stillframe.machine.libvirt.domain import Domain, DomainRef, session_uri
from stillframe.machine.libvirt.machine import LibvirtMachine
from stillframe.restore.captured_disks import CapturedDisks, captured_bases, disk_label
from stillframe.restore.domain_xml import (
    captured_disk,
    file_of,
    is_writable,
    not_captured,
    put_image,
    target_of,
)
from stillframe.restore.read_right import let_read
from stillframe.snapshot.into_store import Save
from stillframe.snapshot.job import JobControl
from stillframe.snapshot.options import SnapshotOptions
from stillframe.snapshot.take import take_snapshot
from stillframe.snapshot.taken import TakenSnapshot
from stillframe.still.export_libvirt import export_libvirt, parse_domain
from stillframe.still.sealing import DataKey
from stillframe.still.sinks import Sink
from stillframe.still.snapshot import Snapshot
from stillframe.store import open_snapshot
from stillframe.store.backends.local import LocalSink

_OLDEST = 9_009_000
"""libvirt 9.9 brought the revert to external snapshots."""
_SUFFIX = ".save"


def save_as(name: str, output: object, key: DataKey | None) -> Save:
    """Return a function for :func:`begin_take` that takes a snapshot and makes it libvirt's.

    Args:
        name: of libvirt's snapshot. output: of the take; key: of the take.

    Raises:
        UsageError: libvirt could not read such a snapshot.
    """
    if key is not None:
        raise UsageError(
            "the save image that libvirt's own snapshot needs would not be encrypted",
            remedy="leave --encrypt and --recipient out, or --libvirt-snapshot",
        )
    if not isinstance(output, str | os.PathLike):
        raise UsageError("libvirt reads a snapshot from a file", remedy="name one with -o")

    def save(
        control: JobControl, machine: Machine, sink: Sink, options: SnapshotOptions
    ) -> TakenSnapshot:
        check_adoptable(machine, name)
        return adopt(take_snapshot(control, machine, sink, options), name)

    return save


def check_adoptable(machine: Machine, name: str) -> None:
    """Check, before the take, that libvirt can adopt the snapshot; the guest is not touched.

    Raises:
        UsageError: the VM is not a libvirt domain, or the name is invalid or taken.
        RefusedError: its libvirt could not revert to the snapshot.
    """
    if not isinstance(machine, LibvirtMachine):
        raise UsageError(
            "the VM is no domain of libvirt, so it has no libvirt snapshots",
            remedy="leave --libvirt-snapshot out",
        )
    if not name.strip() or "/" in name or "\n" in name or name.startswith("."):
        raise UsageError(f"'{name}' is no name for a snapshot of libvirt")
    version = machine.domain.libvirt_version
    if version < _OLDEST:
        raise RefusedError(
            "libvirt-too-old",
            why=f"libvirt {version // 1_000_000}.{version // 1000 % 1000} cannot revert to an"
            " external snapshot; 9.9 and newer can",
            remedy="leave --libvirt-snapshot out; 'stillframe restore --revert' goes back as well",
        )
    if name in machine.domain.snapshot_names():
        raise UsageError(
            f"the domain has a libvirt snapshot '{name}' already", remedy="choose another name"
        )


def adopt(taken: TakenSnapshot, name: str) -> TakenSnapshot:
    """Make a snapshot that was just taken one of libvirt's. The guest runs on.

    Returns:
        The snapshot, with a note about the save image, which libvirt needs besides the copies.

    Raises:
        RefusedError: a disk is not in the snapshot. SinkError: no room for the save image.
        HostError: the domain's user cannot get access to the files.
        MachineError: libvirt's own words. The snapshot itself stays in each case.
    """
    file = taken.file
    memory = Path(f"{file}{_SUFFIX}").absolute()
    with open_snapshot(file) as snapshot, contextlib.ExitStack() as on_failure:
        machine = snapshot.manifest.machine
        assert machine is not None
        assert machine.domain is not None
        xml = _snapshot_xml(snapshot, name, memory)
        export_libvirt(snapshot, LocalSink(memory), zstd=True)
        on_failure.callback(memory.unlink, missing_ok=True)
        if machine.domain.uri == session_uri(machine.uid):
            _let_read(snapshot, file, memory, machine.uid)
        domain = Domain(DomainRef(uri=machine.domain.uri, uuid=machine.domain.uuid))
        try:
            domain.redefine_snapshot(xml)
        finally:
            domain.close()
        on_failure.pop_all()
    note = f"libvirt's snapshot '{name}' needs {memory} and the copies of the disks"
    return msgspec.structs.replace(taken, notes=(*taken.notes, note))


def _snapshot_xml(snapshot: Snapshot, name: str, memory: Path) -> str:
    machine = snapshot.manifest.machine
    assert machine is not None
    assert machine.domain is not None
    captured = CapturedDisks(captured_bases(snapshot.manifest, snapshot.description), machine.disks)
    live = parse_domain(machine.domain.live_xml)
    of_domain = parse_domain(machine.domain.xml)
    root = Element("domainsnapshot")
    SubElement(root, "name").text = name
    SubElement(root, "description").text = f"stillframe: {memory.with_suffix('')}"
    SubElement(root, "state").text = "running" if machine.guest_state == "running" else "paused"
    SubElement(root, "creationTime").text = str(int(time.time()))
    SubElement(root, "memory", {"snapshot": "external", "file": str(memory)})
    disks = SubElement(root, "disks")
    for disk in of_domain.iterfind("devices/disk"):
        name = target_of(disk)
        if not is_writable(disk):
            SubElement(disks, "disk", {"name": name, "snapshot": "no"})
            continue
        found, goes_on_in = captured_disk(disk, live, captured), file_of(disk)
        if found is None:
            raise not_captured(disk)
        words = {"name": name, "snapshot": "external", "type": "file"}
        SubElement(
            SubElement(disks, "disk", words), "source", {"file": goes_on_in or found.backing}
        )
        put_image(disk, found.backing, found.backing_format)
    root.append(of_domain)
    return tostring(root, encoding="unicode")


def _let_read(snapshot: Snapshot, file: str, memory: Path, uid: int) -> None:
    """Give a session's user the files: its libvirt reads them, and makes overlays beside copies."""
    if uid == os.geteuid():
        return
    labels = [disk_label(disk) for disk in snapshot.manifest.captured_disks]
    let_read(snapshot.manifest, file, labels, uid)
    own_directory = Path(f"{file}.disks")
    try:
        for path in (memory, own_directory) if own_directory.is_dir() else (memory,):
            os.chown(path, uid, -1)
    except OSError as error:
        raise HostError(
            f"cannot give {memory} to the domain's user", why=error.strerror, guest_state="running"
        ) from error
