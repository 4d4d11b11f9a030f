"""The plan of a restore, and what stands in its way. Nothing is created or started here.

A recorded command line is data from a file, and is read as such: each option is known and handled,
or it needs the caller's trust.
"""

from __future__ import annotations

import os
from collections.abc import Iterable, Sequence
from pathlib import Path

import msgspec

from stillframe.errors import NotFoundError, RefusedError, TrustError, UsageError
from stillframe.restore.option_value import escape_commas
from stillframe.restore.plan_source import PlanSource
from stillframe.restore.planners import Clock, Wishes, planner_for, planner_of_type
from stillframe.restore.records import RestorePlan, Touch
from stillframe.restore.show import printable, shown_words
from stillframe.still.skeleton import machine_type_of

_SHOWN_COMMAND_CHARS = 400


def plan_restore(
    snapshot: PlanSource,
    *,
    name: str | None = None,
    qmp_socket: str | None = None,
    extra_args: Sequence[str] = (),
    program: str | None = None,
    paused: bool = False,
    directory: Path | None = None,
    clock: Clock = "host",
    stream: bool = False,
    clones: int = 1,
    forwards: bool = False,
) -> RestorePlan:
    """Plan how to start the snapshot; nothing is created, started, opened or connected to.

    Args:
        name: of the new VM; default: the old VM's name.
        qmp_socket: where the new VM's monitor listens; default: a private place.
        extra_args: the caller's own options, of QEMU or of ``board run``. One replaces the recorded
            option that it is another value of (docs/reference/restore.md); the others are added.
            For an imported stream they are the whole command line.
        program: the caller's own choice of QEMU, a name or a path.
        paused: do not let the guest run.
        directory: to be created for sockets, log and overlays; default: the usual places.
        clock: what the guest's RTC shows: the host's time, or the instant's and on from there.
        stream: send all of RAM through the stream, also where an image could hold it.
        clones: how many VMs share one image.
        forwards: forward free ports in place of the first VM's; otherwise forward none.

    Raises:
        RefusedError: the snapshot is for analysis only, or the RTC of such a machine cannot be set
            back.
        UsageError: a bad name, socket path, directory or option of the caller's, or an imported
            stream without any.
        DataError: the recorded command line is malformed.
        TrustError: the recorded program is no QEMU. HostError: there is no QEMU.
    """
    snapshot.check_restorable()
    wishes = Wishes(
        qmp_socket=qmp_socket,
        extra_args=tuple(extra_args),
        program=program,
        paused=paused,
        directory=directory,
        clock=clock,
        stream=stream,
        clones=clones,
        forwards=forwards,
    )
    record = snapshot.manifest.machine
    if record is not None:
        planner = planner_for(record.vmm)
    else:
        machine_type = machine_type_of(snapshot.skeleton())
        planner = planner_of_type(machine_type)
        record = planner.imported(snapshot, machine_type, wishes)
    if name is not None:
        own = (*wishes.extra_args, *_naming(name, record.vmm))
        wishes = msgspec.structs.replace(wishes, extra_args=own)
    return planner.plan(snapshot, record, distrust(snapshot), wishes)


def _naming(name: str, vmm: str) -> tuple[str, str]:
    """Return the option with which this VMM names a VM."""
    if not name or "\0" in name:
        raise UsageError("a VM needs a name that is not empty")
    return ("--name", name) if vmm == "board" else ("-name", f"guest={escape_commas(name)}")


def check_plan(plan: RestorePlan, *, trust: bool) -> None:
    """Raise what prevents a plan from being carried out.

    Raises:
        TrustError: the caller must read the plan first, and ``trust`` is not set.
        RefusedError: an option cannot be used. NotFoundError: a file of the VM is gone.
    """
    if plan.needs_trust and not trust:
        reasons = plan.needs_trust
        command = shown_words(plan.argv)
        if len(command) > _SHOWN_COMMAND_CHARS:
            command = command[:_SHOWN_COMMAND_CHARS] + " ..."
        more = f" (and {len(reasons) - 1} more reasons)" if len(reasons) > 1 else ""
        raise TrustError(
            f"{printable(plan.snapshot)} needs your trust",
            why=f"{printable(reasons[0])}{more}; it would run: {command}",
            remedy="read what it would do with --dry-run, then say --trust",
        )
    if plan.refusals:
        first = plan.refusals[0]
        more = f" (and {len(plan.refusals) - 1} more)" if len(plan.refusals) > 1 else ""
        raise RefusedError(
            f"cannot use {first.option}{more}",
            why=first.reason,
            remedy=first.remedy,
            guest_state="none",
            reasons=tuple((r.option, r.reason, r.remedy) for r in plan.refusals),
        )
    check_required(plan.touches)


def check_required(touches: Iterable[Touch]) -> None:
    """Raises:
    NotFoundError: a file that the VM cannot start without is gone.
    """
    for touch in touches:
        if touch.required and not os.path.exists(touch.target):  # noqa: PTH110 - a name too long
            raise NotFoundError(
                f"there is no {printable(touch.target)}",
                why=f"the VM was started with {touch.option}",
                remedy="put it back, or give that option yourself after --",
            )


def distrust(snapshot: PlanSource) -> tuple[str, ...]:
    """Return why the file as a whole needs the caller's trust."""
    if snapshot.owner_uid is None:
        if snapshot.was_taken_here:
            return ()
        return ("nobody knows who wrote it",)
    if snapshot.owner_uid != os.geteuid():
        return (f"it belongs to user {snapshot.owner_uid}, not to you",)
    if snapshot.others_may_write:
        return ("users other than you may change it",)
    return ()
