"""Plans a restore: the recorded command line, rewritten only where it must be (DESIGN section 9).

Nothing is made or started here. A recorded command line is data from a file, and it is read as
such: each option is known and dealt with, or it needs the caller's trust.
"""

from __future__ import annotations

import os
import platform
from collections.abc import Sequence
from pathlib import Path

from stillframe.errors import DataError, NotFoundError, RefusedError, TrustError, UsageError
from stillframe.model import MachineRecord
from stillframe.restore.board_plan import imported_board, plan_board
from stillframe.restore.draft import Draft, split_options
from stillframe.restore.option_value import escape_commas
from stillframe.restore.overrides import Overrides
from stillframe.restore.places import Places, check_socket_path, choose_places
from stillframe.restore.policy import decide
from stillframe.restore.program import find_emulator
from stillframe.restore.records import RestorePlan
from stillframe.restore.show import printable, shown_words
from stillframe.store.skeleton import machine_type_of
from stillframe.store.snapshot import Snapshot
from stillframe.vmstate.board_cpu import BOARD_MACHINE_PREFIX

_MAX_WORDS = 4096
_MAX_WORD_BYTES = 1 << 17  # MAX_ARG_STRLEN of Linux
_SHOWN_COMMAND_CHARS = 400


def plan_restore(
    snapshot: Snapshot,
    *,
    qmp_socket: str | None = None,
    extra_args: Sequence[str] = (),
    program: str | None = None,
    paused: bool = False,
    directory: Path | None = None,
) -> RestorePlan:
    """Say how the snapshot would be started; nothing is made, started or connected to.

    Args:
        qmp_socket: where the new VM's monitor is to listen; else a private place.
        extra_args: the caller's own QEMU options. One takes the place of a recorded option of
            the same name, if QEMU knows only one of it, or of the same name and id; the others
            are added. Of an imported stream they are the whole command line.
        program: the caller's own choice of QEMU, a name or a path.
        paused: do not let the guest run.
        directory: for sockets, log and overlays, to be made; else the usual places.

    Raises:
        UsageError: a bad socket path, directory or option of the caller's, or an imported stream
            without any.
        DataError: the recorded command line is malformed.
        TrustError: the recorded program is no QEMU. HostError: there is no QEMU.
    """
    record = snapshot.manifest.machine or _imported(snapshot, extra_args)
    _check_words(record)
    if record.vmm == "board":
        return plan_board(
            snapshot,
            record,
            distrust=_distrust(snapshot),
            qmp_socket=qmp_socket,
            extra_args=extra_args,
            program=program,
            paused=paused,
            directory=directory,
        )
    extra = split_options(extra_args, UsageError)
    overrides = Overrides(extra)
    places = choose_places(record.name, directory)
    recorded = split_options(record.argv[1:], DataError)
    draft = Draft(record, places, recorded)
    emulator = find_emulator(record.executable, program)
    draft.touch("program", "run", emulator, None)
    for option in recorded:
        replacement = overrides.take(option)
        if replacement is None:
            decide(draft, option)
        else:
            draft.replace(option, replacement, "your own")
    _complete(draft, overrides)
    for words in overrides.rest():
        draft.add(words, "your own")
    qmp_address = _add_monitor(draft, qmp_socket, places)
    if paused and "-S" not in draft.words:
        draft.add(["-S"], "paused, as you asked")
    if draft.overlays:
        draft.touch("program", "run", "qemu-img", None)
    draft.touch("file", "create", str(places.log), None)
    _check_sockets(draft, places)
    return RestorePlan(
        snapshot=snapshot.container.source.description,
        name=record.name,
        program=emulator,
        argv=(emulator, *draft.words),
        recorded=record.argv,
        cwd=record.cwd if record.cwd and Path(record.cwd).is_dir() else "/",
        machine_type=record.machine_type,
        directory=str(places.run),
        disk_directory=str(places.disks),
        qmp_address=qmp_address,
        log_path=str(places.log),
        rewrites=tuple(draft.rewrites),
        touches=tuple(draft.touches),
        overlays=tuple(draft.overlays),
        refusals=tuple(draft.refusals),
        distrust=_distrust(snapshot),
        risks=tuple(draft.risks),
        notes=tuple(draft.notes),
    )


def check_plan(plan: RestorePlan, *, trust: bool) -> None:
    """Raise what stands in the way of carrying a plan out.

    Raises:
        TrustError: it is for the caller to read the plan first, and ``trust`` was not given.
        RefusedError: an option cannot be used. NotFoundError: a file of the VM is gone.
    """
    if not trust and (plan.distrust or plan.risks):
        reasons = [plan.distrust] * bool(plan.distrust)
        reasons += [f"{risk.option}: {risk.reason}" for risk in plan.risks]
        command = shown_words(plan.argv)
        if len(command) > _SHOWN_COMMAND_CHARS:
            command = command[:_SHOWN_COMMAND_CHARS] + " ..."
        raise TrustError(
            f"{printable(plan.snapshot)} needs your trust",
            why=f"{printable(reasons[0])}; it would run: {command}",
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
    for touch in plan.touches:
        if touch.required and not Path(touch.target).exists():
            raise NotFoundError(
                f"there is no {printable(touch.target)}",
                why=f"the VM was started with {touch.option}",
                remedy="put it back, or give that option yourself after --",
            )


def _imported(snapshot: Snapshot, extra_args: Sequence[str]) -> MachineRecord:
    """A machine for a stream without a recorded command line: the caller's options are it."""
    machine_type = machine_type_of(snapshot.skeleton())
    if machine_type.startswith(BOARD_MACHINE_PREFIX):
        return imported_board(snapshot, machine_type)
    if not extra_args:
        raise UsageError(
            "the snapshot was imported and has no command line",
            remedy="give the options of the VM's QEMU after --",
        )
    return MachineRecord(
        name="",
        pid=0,
        uid=os.geteuid(),
        vmm="qemu",
        vmm_version="",
        machine_type=machine_type,
        accelerator="",
        executable=f"qemu-system-{platform.machine()}",
        argv=(f"qemu-system-{platform.machine()}",),
        cwd=str(Path.cwd()),
        guest_state="",
        vcpus=0,
    )


def _check_words(record: MachineRecord) -> None:
    words = (*record.argv, record.executable, record.cwd)
    if not record.argv:
        raise DataError("the snapshot has an empty command line")
    if len(words) > _MAX_WORDS or any(len(os.fsencode(word)) >= _MAX_WORD_BYTES for word in words):
        raise DataError("the recorded command line is longer than Linux allows")
    if any("\0" in word for word in words):
        raise DataError("the recorded command line has a NUL character")


def _complete(draft: Draft, overrides: Overrides) -> None:
    """The machine type, where the recorded line leaves it to QEMU's default."""
    names = {option.name for option in draft.recorded} | overrides.names
    if draft.record.machine_type and not names & {"machine", "M"}:
        machine = escape_commas(draft.record.machine_type)
        draft.add(["-machine", f"type={machine}"], "the machine by its versioned name")


def _add_monitor(draft: Draft, qmp_socket: str | None, places: Places) -> str:
    path = str(places.qmp if qmp_socket is None else Path(qmp_socket).absolute())
    draft.touch("socket", "listen", path, None)
    words = ["-qmp", f"unix:{escape_commas(path)},server=on,wait=off"]
    draft.add(words, "its monitor")
    if qmp_socket is not None:
        check_socket_path(path)
    return path


def _check_sockets(draft: Draft, places: Places) -> None:
    for touch in draft.touches:
        if touch.kind == "socket" and touch.target.startswith(str(places.run) + "/"):
            check_socket_path(touch.target, made_later=True)


def _distrust(snapshot: Snapshot) -> str:
    if snapshot.owner_uid is None:
        return "nobody knows who wrote it"
    if snapshot.owner_uid != os.geteuid():
        return f"it belongs to user {snapshot.owner_uid}, not to you"
    if snapshot.others_may_write:
        return "users other than you may change it"
    return ""
