"""The pre-flight: what could make a snapshot wrong without anybody noticing (invariant 7).

Each hindrance has its own small function that takes the evidence and yields what it finds. Those
that ask the host are in ``preflight_host``; these ask the monitor. Nothing touches the guest.
QEMU's own background snapshot inhibits or refuses the same things from inside (QEMU
``migration/options.c``: migrate_caps_check, ``migration/ram.c``: ram_write_tracking_compatible).
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Literal

from stillframe.machine import Hindrance, Mode
from stillframe.machine.qemu import preflight_host
from stillframe.machine.qemu.evidence import Evidence, as_list, as_map, ask, gather
from stillframe.machine.qemu.processes import VmInfo
from stillframe.machine.qemu.ram_list import RAM_GUEST_MEMFD, RAM_PROTECTED
from stillframe.machine.qemu.ramblocks import RamTable
from stillframe.qmp.client import QmpClient

Check = Callable[[Evidence], Iterator[Hindrance]]

MIGRATION_IDLE = frozenset({"None", "none", "completed", "failed", "cancelled"})
_UNFIT_STATES = {
    "inmigrate": "it waits for an incoming migration",
    "postmigrate": "it has been migrated away, and its disks are given up",
    "finish-migrate": "its migration is being completed",
    "restore-vm": "a snapshot is being loaded into it",
    "save-vm": "another snapshot is being saved",
    "colo": "it is replicated by COLO",
}
_ARCHITECTURES = """
i386 x86_64 riscv32 riscv64 loongarch64 m68k sh4 sh4eb sparc ppc hppa rx xtensa xtensaeb
"""
"""Their target pages are always 4096 bytes. Arm and MIPS have several sizes, and say in the stream
which; ppc64 and s390x have RAM-like state that ``xen-save-devices-state`` leaves out."""
_PAGE_4096 = frozenset(_ARCHITECTURES.split())
_HINT_PROPERTIES = ("free-page-reporting", "free-page-hint")


def preflight(info: VmInfo, qmp: QmpClient, table: RamTable, mode: Mode) -> list[Hindrance]:
    """Everything that stands in the way of a snapshot now, refusals first.

    Raises:
        MachineError: the monitor or the process went away. HostError: not permitted.
        RefusedError: the RAM blocks cannot be told for certain.
    """
    evidence = gather(info, qmp, table, mode)
    found = [hindrance for check in CHECKS for hindrance in check(evidence)]
    return sorted(found, key=lambda hindrance: hindrance.severity != "refuse")


def migration_blockers(evidence: Evidence) -> Iterator[Hindrance]:
    """A device that cannot be saved; ``xen-save-devices-state`` itself does not look."""
    for reason in as_list(evidence.migration.get("blocked-reasons")):
        yield Hindrance(
            name="migration-blocker",
            reason=f"the VM cannot be migrated, so its state cannot be restored: {reason}",
            remedy="remove the device or option that the reason names",
            severity="refuse",
        )


def migration_running(evidence: Evidence) -> Iterator[Hindrance]:
    """A migration, or QEMU's own snapshot, is under way."""
    status = str(evidence.migration.get("status"))
    if status not in MIGRATION_IDLE:
        yield Hindrance(
            name="migration-running",
            reason=f"a migration of the VM is in state '{status}'",
            remedy="wait for it to end, or cancel it",
            severity="refuse",
        )
    for job in as_list(ask(evidence.qmp, "query-jobs")):
        kind, state = as_map(job).get("type"), as_map(job).get("status")
        if kind in ("snapshot-save", "snapshot-load") and state not in ("concluded", "null"):
            yield Hindrance(
                name="snapshot-running",
                reason=f"QEMU's job '{as_map(job).get('id')}' ({kind}) is {state}",
                remedy="wait for it to end, or cancel it",
                severity="refuse",
            )


def run_state(evidence: Evidence) -> Iterator[Hindrance]:
    """A run state in which RAM and devices do not belong together."""
    why = _UNFIT_STATES.get(evidence.status)
    if why is not None:
        yield Hindrance(
            name="run-state",
            reason=f"the VM's run state is '{evidence.status}': {why}",
            remedy="wait until it runs or is paused",
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
                severity=_in_background(evidence),
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
                severity=_in_background(evidence) if changing else "warn",
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


def _in_background(evidence: Evidence) -> Literal["refuse", "warn"]:
    """For what does no harm while the VM stands still."""
    return "refuse" if evidence.mode == "background" else "warn"


CHECKS: tuple[Check, ...] = (
    migration_blockers,
    migration_running,
    run_state,
    balloon,
    virtio_mem,
    flash,
    confidential,
    target,
    xen,
    *preflight_host.CHECKS,
)
