"""``stillframe fork``: start clones of a snapshot, or of a running VM."""

from __future__ import annotations

from contextlib import closing
from typing import TYPE_CHECKING

import click

from stillframe.cli.cancelling import OneInterrupt
from stillframe.cli.keys import key_options
from stillframe.cli.options import (
    json_option,
    max_drain_option,
    parent_dir_option,
    quiet_option,
    store_option,
)
from stillframe.cli.output import Results
from stillframe.cli.parameters import FILE, VmType
from stillframe.cli.progress import choose_progress
from stillframe.cli.quantities import format_ms
from stillframe.cli.restore import vm_object
from stillframe.cli.text import printable, table

if TYPE_CHECKING:
    from stillframe.api import CloneKind, DiskKind, Keys


@click.command("fork", short_help="Start clones of a snapshot or a running VM.")
@click.argument("target", metavar="FILE|VM", type=VmType())
@click.argument("qemu_arguments", nargs=-1, type=click.UNPROCESSED, metavar="[-- ARGUMENTS]")
@click.option(
    "-n", "--count", type=int, default=1, show_default=True, help="How many clones, 1 to 1000."
)
@click.option(
    "--name", metavar="PATTERN", help="Of the clones; {n} in it is the number of each."
    "  [default: the VM's, and -{n}]",
)  # fmt: skip
@click.option(
    "--keep", type=FILE, metavar="FILE", help="Of a running VM: keep the snapshot in this file."
)
@click.option(
    "--disks", type=click.Choice(["copy", "overlay"]),
    help="Of a running VM, its disks: copied, and the clones run after that; or frozen, so that"
    " they run at once, and the VM goes on in overlays until 'stillframe commit'."
    "  [default: copy]",
)  # fmt: skip
@max_drain_option
@click.option("--program", metavar="QEMU", help="Another QEMU than the recorded one.")
@click.option(
    "--as", "kind", type=click.Choice(["domain", "qemu"]),
    help="Of a libvirt domain: domains again, which is the default; or QEMUs without libvirt.",
)  # fmt: skip
@click.option("--paused", is_flag=True, help="Do not let the guests run.")
@click.option("--wait", is_flag=True, help="Until all of their RAM is there.")
@click.option(
    "--fill",
    is_flag=True,
    help="RAM in memory, also where the snapshot has a complete image ('stillframe image').",
)
@click.option(
    "--trust", is_flag=True, help="You have read what 'restore --dry-run' shows of the file."
)
@store_option
@quiet_option
@parent_dir_option
@json_option
@key_options
def command(
    target: str,
    qemu_arguments: tuple[str, ...],
    count: int,
    name: str | None,
    keep: str | None,
    disks: DiskKind | None,
    max_drain: float,
    program: str | None,
    kind: CloneKind | None,
    paused: bool,
    wait: bool,
    fill: bool,
    trust: bool,
    quiet: bool,
    as_json: bool,
    keys: Keys,
) -> None:
    """Start clones of a snapshot (a FILE, or its name in the store) or of a running VM, which goes
    on.

    All share one image of its RAM; each has its own monitor, serial lines and overlays on the
    disks. A running VM stands still as for 'take'. 'stillframe kill' ends clones.
    """
    from stillframe import api

    with OneInterrupt(), closing(choose_progress(quiet=quiet)) as progress:
        vms = api.fork(
            target,
            count,
            name=name,
            keep=keep,
            disks=disks,
            max_drain_ms=max_drain,
            trust=trust,
            extra_args=qemu_arguments,
            program=program,
            kind=kind,
            paused=paused,
            wait=wait,
            fill=fill,
            keys=keys,
            on_progress=lambda seen: progress.show("taking", seen.ram_done_bytes, seen.ram_bytes),
        )
    rows = [
        (
            vm.name,
            str(vm.pid),
            vm.state,
            "-" if vm.first_instruction_ms is None else format_ms(vm.first_instruction_ms),
            vm.qmp_address,
        )
        for vm in vms
    ]
    ports = [
        (
            vm.name,
            f"{forward.address or '*'}:{forward.port}",
            f"{forward.address or '*'}:{forward.source_port or '?'}",
            f"{forward.guest_address}:{forward.guest_port}/{forward.protocol}",
        )
        for vm in vms
        for forward in vm.forwards
    ]
    notes = dict.fromkeys(note for vm in vms for note in vm.notes)
    Results(as_json=as_json).show(
        [vm_object(vm) for vm in vms],
        [
            *table(("NAME", "PID", "STATE", "RUNS AFTER", "QMP"), rows, right="PID,RUNS AFTER"),
            *(table(("NAME", "PORT", "IN PLACE OF", "OF THE GUEST"), ports) if ports else ()),
            *(f"note: {printable(note)}" for note in notes),
        ],
    )
