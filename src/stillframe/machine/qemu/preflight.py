"""The pre-flight of a QEMU (see ``machine.process.preflight``): what its monitor shows.

QEMU's own background snapshot inhibits or refuses the same things from inside (QEMU
``migration/options.c``: migrate_caps_check, ``migration/ram.c``: ram_write_tracking_compatible).
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import msgspec

from stillframe.machine import Blocker, Mode, Moment
from stillframe.machine.process import preflight as shared
from stillframe.machine.process.inspection import Inspection, ask, gather
from stillframe.machine.process.preflight import in_background
from stillframe.machine.process.preflight_host import Check
from stillframe.machine.process.vm_info import VmInfo
from stillframe.machine.qemu import preflight_host
from stillframe.machine.qemu.disk_requests import stuck_requests
from stillframe.machine.qemu.ram_list import RAM_GUEST_MEMFD, RAM_PROTECTED
from stillframe.machine.qemu.ramblocks import QemuRamTable
from stillframe.qmp.client import QmpClient
from stillframe.qmp.replies import as_list, as_map

_DEVICE_PATHS = ("/machine/peripheral", "/machine/peripheral-anon")
_ARCHITECTURES = """
i386 x86_64 riscv32 riscv64 loongarch64 m68k sh4 sh4eb sparc ppc hppa rx xtensa xtensaeb
"""
"""Their target pages are always 4096 bytes. Arm and MIPS have several sizes, and state theirs in
the stream; ppc64 and s390x have RAM-like state that ``xen-save-devices-state`` leaves out."""
_PAGE_4096 = frozenset(_ARCHITECTURES.split())
_EVER = (1 << 16,)
_UNSAVABLE = {
    "pci-serial-2x": ((0,), _EVER, "QEMU crashes when it saves it"),
    "vmbus-bridge": ((0,), _EVER, "QEMU crashes when it saves it"),
    "isa-cirrus-vga": ((0,), (10,), "QEMU aborts when it loads it again"),
    "isa-vga": ((8,), _EVER, "QEMU crashes when it loads it again"),
    "sd-card-spi": ((8,), _EVER, "QEMU aborts when it loads it again"),
}
"""By QOM type: the first QEMU that may have the fault, the first without it, and its effect. From
the sweep of ``tests/soak/device_sweep.py`` on 7.2 and 10.0."""
_HINT_PROPERTIES = ("free-page-reporting", "free-page-hint")


def preflight(
    info: VmInfo, qmp: QmpClient, table: QemuRamTable, mode: Mode, moment: Moment
) -> list[Blocker]:
    """Return everything that blocks a snapshot now, refusals first.

    Raises:
        MachineError: the monitor or the process went away. HostError: not permitted.
        RefusedError: the RAM blocks cannot be determined for certain.
    """
    inspection = msgspec.structs.replace(
        gather(info, qmp, table.read() if moment != "stop" else (), mode), devices=_devices(qmp)
    )
    if moment == "first":
        flags = {block.idstr: block.flags for block, _page_size in table.listed()}
        inspection = msgspec.structs.replace(inspection, ram_flags=flags)
    return shared.blockers(inspection, CHECKS[moment])


def _devices(qmp: QmpClient) -> dict[str, str]:
    found: dict[str, str] = {}
    for parent in _DEVICE_PATHS:
        for item in as_list(ask(qmp, "qom-list", {"path": parent})):
            kind = str(as_map(item).get("type"))
            if kind.startswith("child<"):
                found[f"{parent}/{as_map(item).get('name')}"] = kind[6:-1]
    return found


def snapshot_jobs(inspection: Inspection) -> Iterator[Blocker]:
    """Find a running snapshot of QEMU's own."""
    for job in as_list(ask(inspection.qmp, "query-jobs")):
        kind, state = as_map(job).get("type"), as_map(job).get("status")
        if kind in ("snapshot-save", "snapshot-load") and state not in ("concluded", "null"):
            yield Blocker(
                name="snapshot-running",
                reason=f"QEMU's job '{as_map(job).get('id')}' ({kind}) is {state}",
                remedy="wait for it to end, or cancel it",
                severity="busy",
            )


def suspended(inspection: Inspection) -> Iterator[Blocker]:
    """Find a suspended guest: QEMU before 9.0 wakes it to migrate it, and a loaded one never wakes
    (QEMU commit b533450e74: system/cpus.c, vm_was_suspended)."""
    if inspection.status == "suspended" and inspection.qmp.version < (9,):
        yield Blocker(
            name="suspended",
            reason="the guest is suspended, and this QEMU (before 9.0) could never wake it once it"
            " is restored",
            remedy="wake it first (system_wakeup)",
            severity="refuse",
        )


def why_unsavable(kind: str, version: Sequence[int]) -> str:
    """Return what a QEMU of that version does wrong with a device of that QOM type, or an empty
    string."""
    since, before, why = _UNSAVABLE.get(kind, (_EVER, _EVER, ""))
    return why if since <= tuple(version) < before else ""


def unsavable(inspection: Inspection) -> Iterator[Blocker]:
    """Find devices that QEMU silently saves or loads wrongly (docs/reference/devices.md)."""
    for path, kind in inspection.devices.items():
        why = why_unsavable(kind, inspection.qmp.version)
        if why:
            yield Blocker(
                name="unsavable-device",
                reason=f"{path} is a {kind}: {why}",
                remedy="unplug the device, or start the VM without it",
                severity="refuse",
            )


def balloon(inspection: Inspection) -> Iterator[Blocker]:
    """Find a balloon, which discards pages past the protection; nothing outside QEMU can inhibit
    it.

    Pages of private and of unnamed memory are saved before they go. Pages of a file are punched out
    before any event, from hugetlbfs also private ones (QEMU ``system/physmem.c``:
    ram_block_discard_range).
    """
    of_files = [
        block
        for block in inspection.blocks
        if block.backing_fd is not None and (block.shared or block.backing == "hugetlbfs")
    ]
    for path, kind in inspection.devices.items():
        if not kind.startswith("virtio-balloon"):
            continue
        on = [
            name
            for name in _HINT_PROPERTIES
            if ask(inspection.qmp, "qom-get", {"path": path, "property": name}) is True
        ]
        if not of_files:
            continue
        if on:
            yield Blocker(
                name=on[0],
                reason=f"{path} has {'=on, '.join(on)}=on: the guest's free pages are"
                f" punched out of {of_files[0].idstr}'s file at any time",
                remedy=f"start the VM without {on[0]}=on or with private memory,"
                " or take it with --mode stop",
                severity=in_background(inspection),
            )
        else:
            yield Blocker(
                name="balloon",
                reason=f"the VM has a balloon ({path}), and {of_files[0].idstr} is a file",
                remedy="better leave it at rest during the snapshot: an inflation is noticed, and"
                " fails the snapshot where the pages cannot be held",
                severity="warn",
            )


def virtio_mem(inspection: Inspection) -> Iterator[Blocker]:
    """Find virtio-mem, which plugs and unplugs parts of its block as the guest agrees."""
    for device in as_list(ask(inspection.qmp, "query-memory-devices")):
        data = as_map(as_map(device).get("data"))
        kind = as_map(device).get("type")
        name = data.get("id") or data.get("memdev")
        if kind == "virtio-mem":
            changing = data.get("size") != data.get("requested-size")
            yield Blocker(
                name="virtio-mem",
                reason=f"virtio-mem device {name} "
                + ("is changing its size" if changing else "may change its size"),
                remedy="wait until its size is the requested one (or request the one that it has),"
                " or use --mode stop"
                if changing
                else "leave its requested size alone during the snapshot; a change is noticed",
                severity=in_background(inspection) if changing else "warn",
            )
        elif kind in ("nvdimm", "virtio-pmem"):
            yield Blocker(
                name="persistent-memory",
                reason=f"{kind} device {name} keeps its content in a host file of its own",
                remedy="restore the snapshot with that file as it was at the instant",
                severity="warn",
            )


def confidential(inspection: Inspection) -> Iterator[Blocker]:
    """Find encrypted or private guest memory, which cannot be read from outside."""
    hidden = [
        idstr
        for idstr, flags in inspection.ram_flags.items()
        if flags & (RAM_PROTECTED | RAM_GUEST_MEMFD)
    ]
    support = ask(
        inspection.qmp,
        "qom-get",
        {"path": "/machine", "property": "confidential-guest-support"},
    )
    sev = as_map(ask(inspection.qmp, "query-sev")).get("enabled") is True
    if hidden or support or sev:
        yield Blocker(
            name="confidential-guest",
            reason="the guest's memory is protected from the host"
            + (f" ({', '.join(hidden)})" if hidden else f" ({support or 'SEV'})"),
            remedy="such a VM cannot be snapshotted from outside",
            severity="refuse",
        )


def target(inspection: Inspection) -> Iterator[Blocker]:
    """Find guests that the stream, in target pages of 4096 bytes, cannot represent."""
    arch = str(as_map(ask(inspection.qmp, "query-target")).get("arch"))
    if arch not in _PAGE_4096:
        yield Blocker(
            name="target-architecture",
            reason=f"{arch} guests have several page sizes, or state that only a migration saves",
            remedy="use QEMU's own snapshot for this VM",
            severity="refuse",
        )


def xen(inspection: Inspection) -> Iterator[Blocker]:
    """Find Xen, under which the guest's RAM is not QEMU's."""
    kind = inspection.qmp.execute("qom-get", {"path": "/machine", "property": "type"})
    if inspection.info.accelerator == "xen" or str(kind).startswith("xen"):
        yield Blocker(
            name="xen",
            reason="the guest's RAM belongs to the Xen hypervisor",
            remedy="use Xen's own save",
            severity="refuse",
        )


_BEFORE_STOP: tuple[Check, ...] = (snapshot_jobs, suspended, unsavable, stuck_requests)
_WRITERS: tuple[Check, ...] = (balloon, *preflight_host.CHECKS)
CHECKS: dict[Moment, tuple[Check, ...]] = {
    "first": (
        *shared.CHECKS["first"],
        *_BEFORE_STOP,
        *_WRITERS,
        virtio_mem,  # we see what it unplugs meanwhile
        confidential,
        target,
        xen,
    ),
    "stop": (*shared.CHECKS["stop"], *_BEFORE_STOP),
    "saved": (*shared.CHECKS["saved"], *_WRITERS),
}
