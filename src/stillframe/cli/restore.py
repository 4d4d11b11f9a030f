"""``stillframe restore``: start a new VM from a snapshot."""

from __future__ import annotations

from typing import TYPE_CHECKING

import click

from stillframe.cli.options import FILE, json_option, quiet_option
from stillframe.cli.output import Results
from stillframe.cli.progress import ByteRate, choose_progress
from stillframe.cli.text import facts, printable

if TYPE_CHECKING:
    from stillframe.api import RestoredVm, RestorePlan


@click.command("restore", short_help="Start a new VM from a snapshot.")
@click.argument("file", type=FILE)
@click.argument("qemu_arguments", nargs=-1, type=click.UNPROCESSED, metavar="[-- ARGUMENTS]")
@click.option(
    "--qmp", "qmp_socket", type=FILE, metavar="SOCKET", help="Where its monitor is to listen."
)
@click.option(
    "--program", metavar="QEMU", help="Another QEMU than the recorded one; not for a board."
)
@click.option("--paused", is_flag=True, help="Do not let the guest run.")
@click.option("--dry-run", is_flag=True, help="Only show what would be started and touched.")
@click.option(
    "--trust",
    is_flag=True,
    help="You have read what --dry-run shows: start it also if the file is not your own.",
)
@quiet_option
@json_option
def command(
    file: str,
    qemu_arguments: tuple[str, ...],
    qmp_socket: str | None,
    program: str | None,
    paused: bool,
    dry_run: bool,
    trust: bool,
    quiet: bool,
    as_json: bool,
) -> None:
    """Start a new VM from a snapshot, with the recorded command line.

    Sockets, serial lines and disks are replaced by its own. ARGUMENTS, of QEMU or of 'board run',
    take the place of recorded ones, or are added. Shows the new VM's pid and monitor once it runs.
    """
    from stillframe import api

    results = Results(as_json=as_json)
    if dry_run:
        plan = api.plan_restore(
            file,
            qmp_socket=qmp_socket,
            extra_args=qemu_arguments,
            program=program,
            paused=paused,
        )
        results.show(_plan_object(plan), api.plan_lines(plan))
        return
    progress = choose_progress(quiet=quiet)
    try:
        vm = api.restore(
            file,
            qmp_socket=qmp_socket,
            trust=trust,
            extra_args=qemu_arguments,
            program=program,
            paused=paused,
            on_progress=ByteRate(progress, "restoring").update,
        )
    finally:
        progress.close()
    results.show(_vm_object(vm), _vm_lines(vm))


def _vm_object(vm: RestoredVm) -> dict[str, object]:
    return {
        "pid": vm.pid,
        "name": vm.name,
        "state": vm.state,
        "qmp": vm.qmp_address,
        "log": vm.log_path,
        "directory": vm.directory,
        "disk_directory": vm.disk_directory,
        "argv": list(vm.argv),
        "notes": list(vm.notes),
    }


def _vm_lines(vm: RestoredVm) -> list[str]:
    lines = facts(
        [
            ("pid", str(vm.pid)),
            *([("name", vm.name)] if vm.name else []),
            ("state", vm.state),
            ("QMP", vm.qmp_address),
            ("log", vm.log_path),
            *([("disks", vm.disk_directory)] if vm.disk_directory else []),
        ]
    )
    return [*lines, *(f"note: {printable(note)}" for note in vm.notes)]


def _plan_object(plan: RestorePlan) -> dict[str, object]:
    return {
        "file": plan.snapshot,
        "name": plan.name,
        "program": plan.program,
        "argv": list(plan.argv),
        "recorded": list(plan.recorded),
        "cwd": plan.cwd,
        "machine_type": plan.machine_type,
        "qmp": plan.qmp_address,
        "log": plan.log_path,
        "directory": plan.directory,
        "disk_directory": plan.disk_directory,
        "rewrites": [
            {"before": item.before, "after": item.after, "reason": item.reason}
            for item in plan.rewrites
        ],
        "touches": [
            {
                "kind": item.kind,
                "access": item.access,
                "target": item.target,
                "option": item.option,
            }
            for item in plan.touches
        ],
        "overlays": [
            {
                "base": item.base,
                "base_format": item.base_format,
                "overlay": item.overlay,
                "in_use": item.in_use,
                "kind": item.kind,
            }
            for item in plan.overlays
        ],
        "needs_trust": [
            *([plan.distrust] if plan.distrust else []),
            *(f"{item.option}: {item.reason}" for item in plan.risks),
        ],
        "refused": [
            {"option": item.option, "reason": item.reason, "remedy": item.remedy}
            for item in plan.refusals
        ],
        "notes": list(plan.notes),
    }
