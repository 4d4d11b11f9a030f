"""The pre-flight: what could make a snapshot wrong without anybody noticing (invariant 7).

Each hindrance has its own small function that takes the evidence and yields what it finds. Those
that ask the host are in ``preflight_host``; these ask the monitor. Nothing touches the guest. These
are for every VM that is seen from outside; each kind adds its own.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Literal

from stillframe.machine import Hindrance
from stillframe.machine.outside import preflight_host
from stillframe.machine.outside.evidence import Evidence, as_list

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


def hindrances(evidence: Evidence, checks: Sequence[Check]) -> list[Hindrance]:
    """Everything that the checks find, refusals first.

    Raises:
        MachineError: the monitor or the process went away. HostError: not permitted.
    """
    found = [hindrance for check in checks for hindrance in check(evidence)]
    return sorted(found, key=lambda hindrance: hindrance.severity != "refuse")


def in_background(evidence: Evidence) -> Literal["refuse", "warn"]:
    """For what does no harm while the VM stands still."""
    return "refuse" if evidence.mode == "background" else "warn"


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
    """A migration, or a snapshot that the VMM takes of itself, is under way."""
    status = str(evidence.migration.get("status"))
    if status not in MIGRATION_IDLE:
        yield Hindrance(
            name="migration-running",
            reason=f"a migration of the VM is in state '{status}'",
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


CHECKS: tuple[Check, ...] = (
    migration_blockers,
    migration_running,
    run_state,
    *preflight_host.CHECKS,
)
