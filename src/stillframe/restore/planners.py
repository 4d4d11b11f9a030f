"""The planners of restores, by kind of machine. A planner registers here; nothing else in this
room knows more than one kind of machine."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Literal

import msgspec

from stillframe.errors import HostError
from stillframe.model import MachineRecord
from stillframe.restore.plan_source import PlanSource
from stillframe.restore.records import RestorePlan
from stillframe.restore.show import printable
from stillframe.wings import hooks

Clock = Literal["host", "instant"]


class Wishes(msgspec.Struct, frozen=True, kw_only=True):
    """What the caller asked for; see :func:`stillframe.restore.plan.plan_restore`."""

    qmp_socket: str | None = None
    extra_args: Sequence[str] = ()
    program: str | None = None
    paused: bool = False
    directory: Path | None = None
    clock: Clock = "host"
    stream: bool = False
    clones: int = 1
    forwards: bool = False


class Planner(msgspec.Struct, frozen=True, kw_only=True):
    """The planner of one kind of machine. ``vmm``: the kind, as recorded.

    ``plan``: from a snapshot, its record, the reasons to distrust it as a whole, and the wishes.
    ``imported``: makes a record for a stream without one; takes the machine type in the stream.
    ``machine_prefix``: of this planner's machine types; empty for all others.
    """

    vmm: str
    plan: Callable[[PlanSource, MachineRecord, tuple[str, ...], Wishes], RestorePlan]
    imported: Callable[[PlanSource, str, Wishes], MachineRecord]
    machine_prefix: str = ""


def planner_for(vmm: str) -> Planner:
    """Return the planner of a recorded kind of machine.

    Raises:
        HostError: there is none.
    """
    found = next((planner for planner in _planners() if planner.vmm == vmm), None)
    if found is None:
        raise HostError(
            f"the snapshot is of a VM of kind '{printable(vmm)}'",
            why="what runs such a VM is not installed",
            remedy="install a Stillframe that has it",
        )
    return found


def planner_of_type(machine_type: str) -> Planner:
    """Return the planner for a stream without a record, by the machine type that it names."""
    return next(p for p in _planners() if machine_type.startswith(p.machine_prefix))


def _planners() -> list[Planner]:
    """Return those of the wings, then QEMU's, which takes all other machines."""
    from stillframe.restore.qemu_plan import PLANNER  # imports this module

    return [*hooks("restore"), PLANNER]
