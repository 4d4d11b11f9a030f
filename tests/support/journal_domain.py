"""Domains of libvirt with the journal guest on two disks."""

from __future__ import annotations

import json
import os
import time
from pathlib import Path
from typing import Any

from guests.domain import GuestDomain
from stillframe.disks.drives import OURS
from tests.support.journal_vm import make_disks
from tests.support.session_libvirt import SessionLibvirt


def journal_domain(
    place: Path,
    formats: tuple[str, str] = ("raw", "qcow2"),
    session: SessionLibvirt | None = None,
    *,
    bus: str = "virtio",
    iothread: bool = False,
) -> GuestDomain:
    """One whose disks are in ``place``; not started. ``bus``: ``virtio`` or ``scsi``."""
    xml, letters = "", "sd" if bus == "scsi" else "vd"
    own_thread = " iothread='1'" * iothread
    if bus == "scsi":
        xml += f"<controller type='scsi' model='virtio-scsi'><driver{own_thread}/></controller>"
    on_disk = own_thread if bus == "virtio" else ""
    for number, image_format in enumerate(formats):
        disk = make_disks(place, image_format)[number]
        if session is not None:
            os.chown(disk, session.uid, -1)
        xml += (
            f"<disk type='file' device='disk'>"
            f"<driver name='qemu' type='{image_format}'{on_disk}/>"
            f"<source file='{disk}'/><target dev='{letters}{'ab'[number]}' bus='{bus}'/></disk>"
        )
    return GuestDomain(
        session=session,
        iothreads=int(iothread),
        extra_devices=xml,
        disks=True,
        mem_mib=8,
        rate_mib_per_s=2,
        append="sf.journal=8 sf.rest_us=2000",
    )


def monitor(domain: GuestDomain, command: str, *, name: str = "") -> Any:
    """What QEMU answers; ``name``: of another domain of that libvirt."""
    text = json.dumps({"execute": command})
    return json.loads(domain.virsh("qemu-monitor-command", name or domain.name, text))["return"]


def assert_writes_on(
    domain: GuestDomain, more: int = 4, within_s: float = 180.0, *, name: str = ""
) -> None:
    """The guest writes to its disks. (On a busy host a flush alone may take seconds.)"""

    def stats() -> list[dict[str, int]]:
        return [entry["stats"] for entry in monitor(domain, "query-blockstats", name=name)]

    def writes() -> int:
        return sum(disk["wr_operations"] for disk in stats())

    before, deadline = writes(), time.monotonic() + within_s
    while (now := writes()) < before + more:
        if time.monotonic() > deadline:
            told = {"vm": name or domain.name, "writes": now - before, "disks": stats()}
            for query in ("query-status", "query-cpus-fast", "query-block-jobs"):
                told[query] = monitor(domain, query, name=name)
            raise AssertionError(f"the guest does not write: {told}")
        time.sleep(0.1)


def nodes_of_ours(domain: GuestDomain) -> list[str]:
    """Names of jobs and nodes that stillframe made and that are still there."""
    nodes = [node["node-name"] for node in monitor(domain, "query-named-block-nodes")]
    jobs = [job["id"] for job in monitor(domain, "query-jobs")]
    return [text for text in (*nodes, *jobs) if text.startswith(OURS)]


def wait_nothing_of_ours(domain: GuestDomain) -> None:
    """What a guard takes back, it takes back soon."""
    deadline = time.monotonic() + 60
    while left := nodes_of_ours(domain):
        assert time.monotonic() < deadline, left
        time.sleep(0.1)


def back_up(domain: GuestDomain, directory: Path) -> list[Path]:
    """libvirt's own backup of both disks; the copies."""
    targets = [directory / f"backup-{name}.qcow2" for name in ("vda", "vdb")]
    disks = "".join(
        f"<disk name='{name}' type='file'><target file='{target}'/><driver type='qcow2'/></disk>"
        for name, target in zip(("vda", "vdb"), targets, strict=True)
    )
    backup = directory / "backup.xml"
    backup.write_text(f"<domainbackup><disks>{disks}</disks></domainbackup>")
    domain.virsh("backup-begin", domain.name, str(backup))
    deadline = time.monotonic() + 60
    while "None" not in domain.virsh("domjobinfo", domain.name):
        assert time.monotonic() < deadline
        time.sleep(0.2)
    backup.unlink()
    return targets
