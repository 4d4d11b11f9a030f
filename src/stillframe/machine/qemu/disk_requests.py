"""Disk requests under way in a QEMU, whatever backend they wait for.

QEMU shows them only in the controllers: a virtio queue's elements in use, AHCI's command issue
register, the busy bit of an IDE channel. Reading these has no side effect (QEMU ``hw/ide/core.c``:
ide_status_read, ``hw/ide/ahci.c``: ahci_port_read).
"""

from __future__ import annotations

import re
from collections.abc import Hashable, Iterator

from stillframe.machine import Blocker
from stillframe.machine.process.inspection import Inspection, ask
from stillframe.machine.process.stuck_io import Pending, file_requests, stuck
from stillframe.qmp.client import QmpClient
from stillframe.qmp.replies import as_list, as_map

_VIRTIO_DISKS = {"virtio-blk": 0, "virtio-scsi": 2}
"""The first queue that carries requests, by device type."""
_MOST_QUEUES = 1024
"""QEMU ``include/hw/virtio/virtio.h``: VIRTIO_QUEUE_MAX."""
_AHCI_CLASS = 0x106
_AHCI_BAR = 5
_ALTERNATE_STATUS = {"ide.0": 0x3F6, "ide.1": 0x376}
_BUSY = 0x80


class _Disk:
    """A disk that a guest sees: its label, and the bus that it is on."""

    def __init__(self, qmp: QmpClient, entry: object) -> None:
        qdev = str(as_map(entry).get("qdev") or "")
        inserted = as_map(as_map(entry).get("inserted"))
        file = str(inserted.get("file"))
        what = inserted.get("drv") if file.startswith("json:") else file
        self.called = f"disk {as_map(entry).get('device') or inserted.get('node-name')} ({what})"
        self.path = qdev if qdev.startswith("/") else f"/machine/peripheral/{qdev}"
        self.bus = str(ask(qmp, "qom-get", {"path": self.path, "property": "parent_bus"}) or "")
        owner, _, self.bus_name = self.bus.rpartition("/")
        self.controller = str(ask(qmp, "qom-get", {"path": owner, "property": "type"}))


def stuck_requests(inspection: Inspection) -> Iterator[Blocker]:
    """Find requests that hang: the guest could not continue until they are answered."""
    if inspection.status not in ("running", "suspended"):
        return  # stopped, so drained; QEMU retries failed requests after cont
    qmp, pid = inspection.qmp, inspection.info.pid
    disks = [_Disk(qmp, entry) for entry in as_list(ask(qmp, "query-block")) if _in_use(entry)]
    names = stuck(lambda: file_requests(pid) | _of_virtio(qmp, disks) | _of_ide(qmp, disks))
    if names:
        yield Blocker(
            name="stuck-disk-request",
            reason=f"a request to {', '.join(names)} has been waiting for seconds; the guest could"
            " not go on before it is answered",
            remedy="mend that storage, or wait until it answers",
            severity="refuse",
        )


def _in_use(entry: object) -> bool:
    return bool(as_map(entry).get("qdev") and as_map(entry).get("inserted"))


def _of_virtio(qmp: QmpClient, disks: list[_Disk]) -> Pending:
    found: set[tuple[str, Hashable]] = set()
    for device in as_list(ask(qmp, "x-query-virtio")):
        path, kind = str(as_map(device).get("path")), str(as_map(device).get("name"))
        if kind not in _VIRTIO_DISKS:
            continue
        behind = [disk.called for disk in disks if disk.path == path or disk.bus.startswith(path)]
        # Do not query the number of queues: QEMU 11.1 aborts at x-query-virtio-status.
        for number in range(_VIRTIO_DISKS[kind], _MOST_QUEUES):
            where = {"path": path, "queue": number}
            queue = as_map(ask(qmp, "x-query-virtio-queue-status", where))
            if not queue:
                break
            if queue.get("inuse"):
                mark = (number, str(queue.get("used-idx")))
                found.add((", ".join(behind) or path, mark))
    return found


def _of_ide(qmp: QmpClient, disks: list[_Disk]) -> Pending:
    found: set[tuple[str, Hashable]] = set()
    ports = [disk for disk in disks if re.fullmatch(r"ide\.\d+", disk.bus_name)]
    if not ports:
        return found
    ahci = _ahci_registers(qmp)
    for disk in ports:
        number = int(disk.bus_name[4:])
        if "ahci" in disk.controller:
            # Several controllers may have a port of that number; any of them may be this disk's.
            words = tuple(qmp.hmp(f"xp /2wx {base + 0x134 + 0x80 * number:#x}") for base in ahci)
            if any(int(word, 16) for text in words for word in text.split(":")[-1].split()):
                found.add((disk.called, words))
        elif (port := _ALTERNATE_STATUS.get(disk.bus_name)) is not None:
            status = qmp.hmp(f"i /b {port:#x}").partition("=")[2].strip()
            if status and status != "0xff" and int(status, 16) & _BUSY:
                found.add((disk.called, status))
    return found


def _ahci_registers(qmp: QmpClient) -> list[int]:
    """Return the guest-physical addresses of the AHCI controllers' registers."""
    return [
        int(str(as_map(region).get("address")))
        for bus in as_list(ask(qmp, "query-pci"))
        for device in as_list(as_map(bus).get("devices"))
        if as_map(as_map(device).get("class_info")).get("class") == _AHCI_CLASS
        for region in as_list(as_map(device).get("regions"))
        if as_map(region).get("bar") == _AHCI_BAR and int(str(as_map(region).get("address"))) > 0
    ]
