"""The pre-flight of a QEMU (see ``machine.outside.preflight``): what its monitor tells.

QEMU's own background snapshot inhibits or refuses the same things from inside (QEMU
``migration/options.c``: migrate_caps_check, ``migration/ram.c``: ram_write_tracking_compatible).
"""

from __future__ import annotations

from collections.abc import Iterator

import msgspec

from stillframe.machine import Hindrance, Mode
from stillframe.machine.outside import preflight as shared
from stillframe.machine.outside.evidence import Evidence, as_list, as_map, ask, gather
from stillframe.machine.outside.preflight import Check, in_background
from stillframe.machine.outside.vm_info import VmInfo
from stillframe.machine.qemu import preflight_host
from stillframe.machine.qemu.ram_list import RAM_GUEST_MEMFD, RAM_PROTECTED
from stillframe.machine.qemu.ramblocks import QemuRamTable
from stillframe.qmp.client import QmpClient

_DEVICE_PATHS = ("/machine/peripheral", "/machine/peripheral-anon")
_DEVICES_MAX = 1024
_ARCHITECTURES = """
i386 x86_64 riscv32 riscv64 loongarch64 m68k sh4 sh4eb sparc ppc hppa rx xtensa xtensaeb
"""
"""Their target pages are always 4096 bytes. Arm and MIPS have several sizes, and say in the stream
which; ppc64 and s390x have RAM-like state that ``xen-save-devices-state`` leaves out."""
_PAGE_4096 = frozenset(_ARCHITECTURES.split())
_HINT_PROPERTIES = ("free-page-reporting", "free-page-hint")


def preflight(info: VmInfo, qmp: QmpClient, table: QemuRamTable, mode: Mode) -> list[Hindrance]:
    """Everything that stands in the way of a snapshot now, refusals first.

    Raises:
        MachineError: the monitor or the process went away. HostError: not permitted.
        RefusedError: the RAM blocks cannot be told for certain.
    """
    evidence = msgspec.structs.replace(
        gather(info, qmp, table.read(), mode),
        ram_flags={block.idstr: block.flags for block, _page_size in table.listed()},
        devices=_devices(qmp),
    )
    return shared.hindrances(evidence, CHECKS)


def _devices(qmp: QmpClient) -> dict[str, str]:
    found: dict[str, str] = {}
    for parent in _DEVICE_PATHS:
        for item in as_list(ask(qmp, "qom-list", {"path": parent}))[:_DEVICES_MAX]:
            kind = str(as_map(item).get("type"))
            if kind.startswith("child<"):
                found[f"{parent}/{as_map(item).get('name')}"] = kind[6:-1]
    return found


def snapshot_jobs(evidence: Evidence) -> Iterator[Hindrance]:
    """QEMU's own snapshot is under way."""
    for job in as_list(ask(evidence.qmp, "query-jobs")):
        kind, state = as_map(job).get("type"), as_map(job).get("status")
        if kind in ("snapshot-save", "snapshot-load") and state not in ("concluded", "null"):
            yield Hindrance(
                name="snapshot-running",
                reason=f"QEMU's job '{as_map(job).get('id')}' ({kind}) is {state}",
                remedy="wait for it to end, or cancel it",
                severity="refuse",
            )


def balloon(evidence: Evidence) -> Iterator[Hindrance]:
    """A balloon gives pages away behind the protection; from outside nobody can inhibit it."""
    for path, kind in evidence.devices.items():
        if not kind.startswith("virtio-balloon"):
            continue
        reporting = [
            name
            for name in _HINT_PROPERTIES
            if ask(evidence.qmp, "qom-get", {"path": path, "property": name}) is True
        ]
        if reporting:
            yield Hindrance(
                name=reporting[0],
                reason=f"{path} has {'=on, '.join(reporting)}=on: the guest's free pages are"
                " dropped at any time",
                remedy=f"start the VM without {reporting[0]}=on, or take it with --mode stop",
                severity=in_background(evidence),
            )
        else:
            yield Hindrance(
                name="balloon",
                reason=f"the VM has a balloon ({path})",
                remedy="do not inflate it during the snapshot; an inflation is noticed,"
                " and fails the snapshot",
                severity="warn",
            )


def virtio_mem(evidence: Evidence) -> Iterator[Hindrance]:
    """virtio-mem plugs and unplugs parts of its block as the guest agrees."""
    for device in as_list(ask(evidence.qmp, "query-memory-devices")):
        data = as_map(as_map(device).get("data"))
        kind = as_map(device).get("type")
        name = data.get("id") or data.get("memdev")
        if kind == "virtio-mem":
            changing = data.get("size") != data.get("requested-size")
            yield Hindrance(
                name="virtio-mem",
                reason=f"virtio-mem device {name} "
                + ("is changing its size" if changing else "may change its size"),
                remedy="wait until its size is the requested one"
                if changing
                else "leave its requested size alone during the snapshot; a change is noticed",
                severity=in_background(evidence) if changing else "warn",
            )
        elif kind in ("nvdimm", "virtio-pmem"):
            yield Hindrance(
                name="persistent-memory",
                reason=f"{kind} device {name} keeps its content in a host file of its own",
                remedy="restore the snapshot with that file as it was at the instant",
                severity="warn",
            )


def flash(evidence: Evidence) -> Iterator[Hindrance]:
    """A writable flash is a RAM block and a drive at once."""
    for block in as_list(ask(evidence.qmp, "query-block")):
        device = str(as_map(block).get("device") or as_map(block).get("qdev"))
        inserted = as_map(as_map(block).get("inserted"))
        if inserted and "flash" in device and inserted.get("ro") is not True:
            yield Hindrance(
                name="writable-flash",
                reason=f"{device} is in RAM and, written at once, in {inserted.get('file')}",
                remedy="restore the snapshot with that file as it was at the instant",
                severity="warn",
            )


def confidential(evidence: Evidence) -> Iterator[Hindrance]:
    """Encrypted or private guest memory cannot be read from outside."""
    hidden = [
        idstr
        for idstr, flags in evidence.ram_flags.items()
        if flags & (RAM_PROTECTED | RAM_GUEST_MEMFD)
    ]
    support = ask(
        evidence.qmp,
        "qom-get",
        {"path": "/machine", "property": "confidential-guest-support"},
    )
    sev = as_map(ask(evidence.qmp, "query-sev")).get("enabled") is True
    if hidden or support or sev:
        yield Hindrance(
            name="confidential-guest",
            reason="the guest's memory is protected from the host"
            + (f" ({', '.join(hidden)})" if hidden else f" ({support or 'SEV'})"),
            remedy="such a VM cannot be snapshotted from outside",
            severity="refuse",
        )


def target(evidence: Evidence) -> Iterator[Hindrance]:
    """The stream is written in target pages of 4096 bytes."""
    arch = str(as_map(ask(evidence.qmp, "query-target")).get("arch"))
    if arch not in _PAGE_4096:
        yield Hindrance(
            name="target-architecture",
            reason=f"{arch} guests have several page sizes, or state that only a migration saves",
            remedy="use QEMU's own snapshot for this VM",
            severity="refuse",
        )


def xen(evidence: Evidence) -> Iterator[Hindrance]:
    """Under Xen the guest's RAM is not QEMU's."""
    kind = evidence.qmp.execute("qom-get", {"path": "/machine", "property": "type"})
    if evidence.info.accelerator == "xen" or str(kind).startswith("xen"):
        yield Hindrance(
            name="xen",
            reason="the guest's RAM belongs to the Xen hypervisor",
            remedy="use Xen's own save",
            severity="refuse",
        )


CHECKS: tuple[Check, ...] = (
    *shared.CHECKS,
    snapshot_jobs,
    balloon,
    virtio_mem,
    flash,
    confidential,
    target,
    xen,
    *preflight_host.CHECKS,
)
