"""``stillframe restore``: start a new VM from a snapshot."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import closing
from typing import TYPE_CHECKING, Any, Literal

import click

from stillframe.cli import restore_domain
from stillframe.cli.cancelling import OneInterrupt
from stillframe.cli.keys import key_options
from stillframe.cli.options import json_option, parent_dir_option, quiet_option, store_option
from stillframe.cli.output import Results, as_object
from stillframe.cli.parameters import FILE, SNAPSHOT
from stillframe.cli.progress import ByteRate, choose_progress
from stillframe.cli.quantities import format_ms
from stillframe.cli.text import facts, printable
from stillframe.errors import UsageError

if TYPE_CHECKING:
    from stillframe.api import Keys, RestoredVm, RestorePlan


_PLAN_KEYS = {"snapshot": "file", "qmp_address": "qmp", "log_path": "log", "refusals": "refused"}


@click.command("restore", short_help="Start a new VM from a snapshot.")
@click.argument("file", type=SNAPSHOT)
@click.argument("qemu_arguments", nargs=-1, type=click.UNPROCESSED, metavar="[-- ARGUMENTS]")
@click.option(
    "--qmp", "qmp_socket", type=FILE, metavar="SOCKET", help="Where its monitor is to listen."
)
@click.option(
    "--program", metavar="QEMU", help="Another QEMU than the recorded one; not for a board."
)
@click.option(
    "--as",
    "kind",
    type=click.Choice(["domain", "qemu"]),
    help="Of a libvirt domain: a new domain (default), or a QEMU without libvirt.",
)
@click.option("--name", help="Of the new VM; else it is called as the old one.")
@click.option(
    "--revert",
    is_flag=True,
    help="Of a libvirt domain: the same domain again, ended first if it runs, with its disks as"
    " they were.",
)
@click.option("--yes", is_flag=True, help="Do not ask before --revert ends the domain.")
@click.option("--paused", is_flag=True, help="Do not let the guest run.")
@click.option(
    "--clock",
    type=click.Choice(["host", "instant"]),
    default="host",
    show_default=True,
    help="What its RTC shows: the host's time, or the instant's, going on from there.",
)
@click.option("--stream", is_flag=True, help="All of RAM before it runs, also where it need not.")
@click.option(
    "--fill",
    is_flag=True,
    help="RAM in memory, also where there is a complete image ('stillframe image').",
)
@click.option("--wait", is_flag=True, help="Until all of its RAM is there.")
@click.option(
    "--verify-disks", is_flag=True, help="Read the snapshot's disks whole, to check their digests."
)
@click.option("--dry-run", is_flag=True, help="Only show what would be started and touched.")
@click.option(
    "--trust",
    is_flag=True,
    help="You have read what --dry-run shows: start it also if it comes from elsewhere.",
)
@store_option
@quiet_option
@parent_dir_option
@json_option
@key_options
def command(
    file: str,
    qemu_arguments: tuple[str, ...],
    qmp_socket: str | None,
    program: str | None,
    kind: Literal["domain", "qemu"] | None,
    name: str | None,
    revert: bool,
    yes: bool,
    paused: bool,
    clock: Literal["host", "instant"],
    verify_disks: bool,
    stream: bool,
    fill: bool,
    wait: bool,
    dry_run: bool,
    trust: bool,
    quiet: bool,
    as_json: bool,
    keys: Keys,
) -> None:
    """Start a new VM from a snapshot, with the recorded command line.

    Sockets, serial lines and disks are replaced by its own. ARGUMENTS, of QEMU or of 'board run',
    take the place of recorded ones, or are added. A snapshot of a libvirt domain becomes a new,
    transient domain. Shows the new VM's pid and monitor once it runs.
    """
    from stillframe import api

    if stream and fill:
        raise UsageError("--stream and --fill contradict each other", remedy="leave one out")
    results = Results(as_json=as_json)
    if restore_domain.is_domain(file, kind, keys):
        restore_domain.refuse_options(
            {"ARGUMENTS": qemu_arguments, "--qmp": qmp_socket, "--program": program,
             "--clock instant": clock == "instant"}
        )  # fmt: skip
        restore_domain.run(
            file, results, name=name, revert=revert, yes=yes, paused=paused,
            verify_disks=verify_disks, stream=stream, wait=wait, dry_run=dry_run, trust=trust,
            quiet=quiet, keys=keys,
        )  # fmt: skip
        return
    if revert:
        raise UsageError("--revert is for a domain of libvirt", remedy="leave it out: a new VM")
    if dry_run:
        plan = api.plan_restore(
            file,
            name=name,
            qmp_socket=qmp_socket,
            extra_args=qemu_arguments,
            program=program,
            paused=paused,
            clock=clock,
            stream=stream,
            fill=fill,
            keys=keys,
        )
        results.show(_plan_object(plan), api.plan_lines(plan))
        return
    with OneInterrupt(), closing(choose_progress(quiet=quiet)) as progress:
        vm = api.restore(
            file,
            name=name,
            qmp_socket=qmp_socket,
            trust=trust,
            extra_args=qemu_arguments,
            program=program,
            paused=paused,
            clock=clock,
            verify_disks=verify_disks,
            stream=stream,
            fill=fill,
            wait=wait,
            keys=keys,
            on_progress=ByteRate(progress, "restoring").update,
        )
    results.show(vm_object(vm), _vm_lines(vm))


def vm_object(vm: RestoredVm) -> dict[str, object]:
    return {
        "pid": vm.pid,
        "name": vm.name,
        "state": vm.state,
        "qmp": vm.qmp_address,
        "log": vm.log_path,
        "directory": vm.directory,
        "disk_directory": vm.disk_directory,
        "sockets": list(vm.sockets),
        "forwards": as_object(list(vm.forwards)),
        "on_image": vm.is_on_image,
        "first_instruction_ms": vm.first_instruction_ms,
        "resident_ms": vm.resident_ms,
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
            *_times(vm),
        ]
    )
    return [*lines, *(f"note: {printable(note)}" for note in vm.notes)]


def _times(vm: RestoredVm) -> Iterator[tuple[str, str]]:
    if vm.first_instruction_ms is not None:
        yield "runs after", format_ms(vm.first_instruction_ms)
    if vm.resident_ms is None:
        yield "RAM", "is being filled; 'stillframe ps' shows how far"
    else:
        yield "all of RAM", f"after {format_ms(vm.resident_ms)}"


def _plan_object(plan: RestorePlan) -> dict[str, object]:
    data: dict[str, Any] = as_object(plan)
    for name, key in _PLAN_KEYS.items():
        data[key] = data.pop(name)
    run_as = data.pop("run_as")
    return data | {
        "needs_trust": list(plan.needs_trust),
        "user": run_as["uid"] if run_as else None,
    }
