"""The pre-flight: what could make a snapshot wrong unnoticed (invariant 7).

Each blocker has its own small function, which takes the evidence and yields its findings. These
functions ask the monitor; those that ask the host are in ``preflight_host``. Nothing touches the
guest. These checks apply to every VM seen from outside; each kind adds its own.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from typing import Literal

from stillframe.machine import Blocker, Moment
from stillframe.machine.process import preflight_host
from stillframe.machine.process.host_cpu import cpu_ties
from stillframe.machine.process.inspection import Inspection, ask
from stillframe.machine.process.preflight_host import Check
from stillframe.qmp.replies import as_list, as_map

MIGRATION_IDLE = frozenset({"None", "none", "completed", "failed", "cancelled"})
_UNFIT_STATES = {
    "inmigrate": "it waits for an incoming migration",
    "postmigrate": "it has been migrated away, and its disks are given up",
    "finish-migrate": "its migration is being completed",
    "restore-vm": "a snapshot is being loaded into it",
    "save-vm": "another snapshot is being saved, or was left so",
    "colo": "it is replicated by COLO",
}
_ONLY_ELSEWHERE = re.compile(
    r"^The (?!vvfat).* format used by node|VHOST_F_LOG_ALL|failed to allocate shared memory"
)
"""Either two hosts would share one disk image (QEMU ``block/vmdk.c``, ``vdi.c``, ...: once the VM
has stopped, the file holds all writes), or a vhost cannot log writes (we see those in page
tables)."""
_PASSING_STATES = ("finish-migrate", "restore-vm", "save-vm")


def blockers(inspection: Inspection, checks: Sequence[Check]) -> list[Blocker]:
    """Return everything that the checks find, refusals first.

    Raises:
        MachineError: the monitor or the process went away. HostError: not permitted.
    """
    found = [blocker for check in checks for blocker in check(inspection)]
    order = ("refuse", "busy", "warn")
    return sorted(found, key=lambda blocker: order.index(blocker.severity))


def in_background(inspection: Inspection) -> Literal["refuse", "warn"]:
    """Return the severity of a problem that does no harm while the VM is paused."""
    return "refuse" if inspection.mode == "background" else "warn"


def migration_blockers(inspection: Inspection) -> Iterator[Blocker]:
    """Find devices that cannot be saved; ``xen-save-devices-state`` itself does not check."""
    for reason in as_list(inspection.migration.get("blocked-reasons")):
        if "dump-guest-memory" in str(reason):
            continue  # ends with the dump
        if cpu_ties([reason], ()) or _ONLY_ELSEWHERE.search(str(reason)):
            yield Blocker(
                name="other-host",
                reason=f"the VM cannot be migrated: {reason}",
                remedy="restore the snapshot on this host",
                severity="warn",
            )
            continue
        yield Blocker(
            name="migration-blocker",
            reason=f"the VM cannot be migrated, so its state cannot be restored: {reason}",
            remedy=_blocker_remedy(str(reason))
            + ", or save RAM only with --for-analysis (not restorable)",
            severity="refuse",
        )


def _blocker_remedy(reason: str) -> str:
    mounted = re.search(r"VirtFS export path '(.*)' is mounted", reason)
    if mounted:
        return f"unmount the guest's 9p file system of {mounted[1]}"
    return "remove the device or option that the reason names"


def migration_running(inspection: Inspection) -> Iterator[Blocker]:
    """Find a running migration, or a snapshot that the VMM takes of itself."""
    status = str(inspection.migration.get("status"))
    if status not in MIGRATION_IDLE:
        yield Blocker(
            name="migration-running",
            reason=f"a migration of the VM is in state '{status}'",
            remedy="wait for it to end, or cancel it",
            severity="busy",
        )


def dump(inspection: Inspection) -> Iterator[Blocker]:
    """Find a running dump of guest memory: meanwhile QEMU refuses ``cont``
    (``monitor/qmp-cmds.c``)."""
    if as_map(ask(inspection.qmp, "query-dump")).get("status") == "active":
        yield Blocker(
            name="dump-running",
            reason="the VM's memory is being dumped, and it may not go on before that is done",
            remedy="wait for the dump to end",
            severity="busy",
        )


def run_state(inspection: Inspection) -> Iterator[Blocker]:
    """Find a run state in which RAM and devices do not match."""
    why = _UNFIT_STATES.get(inspection.status)
    if why is not None:
        yield Blocker(
            name="run-state",
            reason=f"the VM's run state is '{inspection.status}': {why}",
            remedy="wait until it runs or is paused"
            + (
                "; where nothing is saved, send it 'stop' and then 'cont'"
                * (inspection.status == "save-vm")
            ),
            severity="busy" if inspection.status in _PASSING_STATES else "refuse",
        )


BEFORE_STOP: tuple[Check, ...] = (dump, migration_blockers, migration_running, run_state)
CHECKS: dict[Moment, tuple[Check, ...]] = {
    "first": (*BEFORE_STOP, *preflight_host.CHECKS),
    "stop": BEFORE_STOP,
    "saved": preflight_host.WRITERS,
}
