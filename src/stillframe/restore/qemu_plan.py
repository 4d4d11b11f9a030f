"""The plan of a QEMU's restore: the recorded command line, rewritten only where it must be."""

from __future__ import annotations

import contextlib
import os
import platform
from collections.abc import Sequence
from pathlib import Path

import msgspec

from stillframe.errors import DataError, UsageError
from stillframe.machine.process.host_cpu import difference, host_cpu
from stillframe.machine.qemu.command_line import parse_command_line
from stillframe.machine.qemu.config_file import Expansion
from stillframe.machine.qemu.options import split
from stillframe.model import MachineRecord
from stillframe.restore.argv_reader import unaccounted
from stillframe.restore.builder import Builder
from stillframe.restore.captured_disks import CapturedDisks, captured_bases
from stillframe.restore.clock import clock_shift_ns
from stillframe.restore.displays import default_display
from stillframe.restore.drive_names import drive_names
from stillframe.restore.drives import SHORT_FORMS
from stillframe.restore.ledger import FIRMWARE_DIRECTORIES
from stillframe.restore.networks import default_network
from stillframe.restore.on_image import is_memory, plan_image
from stillframe.restore.option import Option, split_options
from stillframe.restore.option_value import escape_commas
from stillframe.restore.overrides import Overrides
from stillframe.restore.places import choose_places
from stillframe.restore.plan_source import PlanSource
from stillframe.restore.planners import Planner, Wishes
from stillframe.restore.program import find_emulator
from stillframe.restore.records import (
    ImagePlan,
    Refusal,
    RestorePlan,
    Risk,
    streamed_note,
)
from stillframe.restore.rules import decide
from stillframe.restore.run_as import choose_user
from stillframe.restore.show import printable, shown_words

_MAX_WORDS = 4096
_MAX_WORD_BYTES = 1 << 17  # MAX_ARG_STRLEN of Linux
_NET_ADMIN = 1 << 12
_KEYMAP = "en-us"


def plan_qemu(
    snapshot: PlanSource, record: MachineRecord, distrust: tuple[str, ...], wishes: Wishes
) -> RestorePlan:
    """Plan how to start the snapshot of a QEMU; see ``restore.plan.plan_restore``."""
    _check_words(record)
    plan = _plan(snapshot, record, distrust, wishes)
    if snapshot.was_taken_here or plan.risks or record.cwd == "/":
        return plan
    # A file from elsewhere does not choose the directory, unless something is relative to it.
    in_root = _plan(snapshot, msgspec.structs.replace(record, cwd="/"), distrust, wishes)
    if not in_root.risks:
        return in_root
    risk = Risk(option="the command line", reason=f"it would run in {record.cwd}")
    return msgspec.structs.replace(plan, risks=(risk,))


def _plan(
    snapshot: PlanSource, record: MachineRecord, distrust: tuple[str, ...], wishes: Wishes
) -> RestorePlan:
    gone = "" if _is_directory(record.cwd) else record.cwd
    if gone:
        record = msgspec.structs.replace(record, cwd="/")
    run_as = choose_user(record.uid)
    if record.uid not in (os.geteuid(), run_as.uid if run_as else None):
        distrust += (f"its VM ran as user {record.uid}, and would run as you",)
    recorded = split_options((record.command_line or record.argv)[1:], DataError)
    overrides = Overrides(recorded, _own_options(recorded, wishes.extra_args))
    builder = Builder(
        record,
        choose_places(record.name, wishes.directory, run_as=run_as),
        overrides.standing,
        replaced=overrides.replaced,
        own=overrides.own,
        unprivileged=run_as is not None or not _may_administer_networks(),
        moves_ports=wishes.forwards,
        captured=CapturedDisks(
            captured_bases(snapshot.manifest, snapshot.description), record.disks
        ),
        drive_names=drive_names(recorded, record.machine_type),
    )
    for number, option in enumerate(recorded):
        words = overrides.words_at(number)
        if words is None:
            decide(builder, option)
        else:
            builder.replace(option, words, "your own")
    _complete(builder, overrides)
    _place_all_disks(builder)
    _check_cpu(builder)
    if snapshot.manifest.machine is not None:
        default_network(builder)
        default_display(builder)
    qmp_address = builder.add_monitor(wishes.qmp_socket)
    builder.add(["-qmp", f"unix:{escape_commas(qmp_address)},server=on,wait=off"], "its monitor")
    if wishes.paused and "-S" not in builder.words:
        builder.add(["-S"], "paused, as you asked")
    argv = (find_emulator(record.executable, wishes.program), *builder.words)
    if gone:
        builder.note(f"its directory {gone} is not here: relative names are those of /")
    cwd = record.cwd
    _files_before_qemus_own(builder, cwd)
    targets = {touch.target for touch in builder.touches}
    own = [word for option in overrides.own for word in option.words]
    for option_word, text in unaccounted(argv, targets, cwd=cwd, own=own):
        reason = f"it names {text}, which the plan does not account for"
        builder.risk(shown_words([option_word]), reason)
    image = _image(snapshot, builder, wishes)
    shift_ns = clock_shift_ns(snapshot, wishes.clock, builder)
    return builder.plan(
        snapshot,
        argv,
        name=parse_command_line(argv).name or record.name,
        recorded=record.argv,
        cwd=cwd,
        machine_type=record.machine_type,
        recorded_program=f"{record.executable} {record.vmm_version}".strip(),
        qmp_address=qmp_address,
        distrust=distrust,
        run_as=run_as,
        clock_shift_ns=shift_ns,
        image=image,
    )


def _is_directory(path: str) -> bool:
    return os.path.isabs(path) and os.path.isdir(path)  # noqa: PTH112, PTH117 - any text


def _image(snapshot: PlanSource, builder: Builder, wishes: Wishes) -> ImagePlan:
    """Plan what RAM goes on an image; a note says why none does, if the caller did not ask."""
    if wishes.stream:
        return ImagePlan(streamed="as you asked")
    own = [option for option in builder.own if is_memory(option)]
    if own:
        image = ImagePlan(streamed=f"{own[0].text} is your own")
    else:
        image = plan_image(builder.words, snapshot.blocks, share=wishes.clones == 1)
    if image.streamed:
        builder.note(streamed_note(image.streamed))
    return image


def imported_qemu(_snapshot: PlanSource, machine_type: str, wishes: Wishes) -> MachineRecord:
    """Return a machine for a stream without a recorded command line: the caller's options are it.

    Raises:
        UsageError: the caller gave none.
    """
    if not wishes.extra_args:
        raise UsageError(
            "the snapshot was imported and has no command line",
            remedy="give the options of the VM's QEMU after --",
        )
    program = f"qemu-system-{platform.machine()}"
    return MachineRecord(
        name="",
        pid=0,
        uid=os.geteuid(),
        vmm="qemu",
        vmm_version="",
        machine_type=machine_type,
        accelerator="",
        executable=program,
        argv=(program,),
        cwd=str(Path.cwd()),
        guest_state="",
        vcpus=0,
    )


PLANNER = Planner(vmm="qemu", plan=plan_qemu, imported=imported_qemu)


def _own_options(recorded: Sequence[Option], words: Sequence[str]) -> list[Option]:
    """Return the caller's options. A ``-readconfig`` is expanded, as it was in the recorded command
    line: each option in the file takes the place of its recorded counterpart.

    Raises:
        UsageError: malformed options, or a file that cannot be read.
    """
    own = split_options(words, UsageError)
    if any(option.name == "readconfig" for option in recorded):
        return own
    expansion = Expansion(Path.cwd())
    line = expansion.expand(split(["", *words])) if "readconfig" in {o.name for o in own} else None
    if expansion.notes:
        raise UsageError(expansion.notes[0], remedy="give a file that you can read")
    return own if line is None else split_options([w for o in line for w in o.words], UsageError)


def _files_before_qemus_own(builder: Builder, cwd: str) -> None:
    """Note files that QEMU would find in its working directory before its own
    (``qemu_find_file``)."""
    names = {_KEYMAP}
    for directory in FIRMWARE_DIRECTORIES:
        with contextlib.suppress(OSError):
            names.update(entry.name for entry in Path(directory).iterdir())
    for name in sorted(names):
        if Path(cwd, name).is_file():
            path = str(Path(cwd, name))
            reason = f"{path} would be taken in place of QEMU's own file of that name"
            builder.touch("file", "read", path, reason=reason)


def _check_words(record: MachineRecord) -> None:
    words = (*record.argv, *record.command_line, record.executable, record.cwd)
    if not record.argv:
        raise DataError("the snapshot has an empty command line")
    if len(words) > _MAX_WORDS or any(len(os.fsencode(word)) >= _MAX_WORD_BYTES for word in words):
        raise DataError("the recorded command line is longer than Linux allows")
    if any("\0" in word for word in words):
        raise DataError("the recorded command line has a NUL character")


def _complete(builder: Builder, overrides: Overrides) -> None:
    """Add the caller's other options, and the machine type if that was left to QEMU's default."""
    names = {option.name for option in builder.recorded} | overrides.names
    if builder.record.machine_type and not names & {"machine", "M"}:
        machine = escape_commas(builder.record.machine_type)
        builder.add(["-machine", f"type={machine}"], "the machine by its versioned name")
    for option in overrides.rest:
        builder.add(option.words, "your own")
        if builder.record.argv[1:] and option.name in ("drive", "nic", "net", "netdev", "device"):
            builder.note(f"{option.text} takes the place of no recorded option: it is added")


def _place_all_disks(builder: Builder) -> None:
    """Refuse or note a disk of the snapshot without a known option: none is left out silently."""
    given = any(o.name in ("device", "drive", "blockdev", *SHORT_FORMS) for o in builder.own)
    for base in builder.captured.unplaced():
        if given:
            builder.note(f"the snapshot's disk {base.label} is not used: you gave disks yourself")
            continue
        builder.refusals.append(
            Refusal(
                option=f"the snapshot's disk {printable(base.label)}",
                reason="no recorded option is known to be that disk's",
                remedy=f"put an overlay over {printable(base.backing)}, and give it after --",
            )
        )


def _check_cpu(builder: Builder) -> None:
    """Refuse a guest that was shown what only its CPU has, if this host's CPU differs."""
    recorded, ties = builder.record.host_cpu, builder.record.cpu_ties
    if recorded is not None and ties and (why := difference(recorded, host_cpu())) is not None:
        builder.refusals.append(
            Refusal(
                option=f"the recorded CPU ({printable(ties[0])})",
                reason=f"it binds the guest to the CPU of the host it was taken on: {why}",
                remedy="restore it on a host with such a CPU",
            )
        )


def _may_administer_networks() -> bool:
    """Whether this process has CAP_NET_ADMIN (proc(5): CapEff)."""
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith("CapEff:"):
            return bool(int(line.split()[1], 16) & _NET_ADMIN)
    return False
