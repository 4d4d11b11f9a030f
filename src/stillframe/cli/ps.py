"""``stillframe ps``: list the running VMs."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

import click

from stillframe.cli.options import json_option
from stillframe.cli.output import Results, as_object
from stillframe.cli.quantities import format_bytes
from stillframe.cli.text import printable, table

if TYPE_CHECKING:
    from stillframe.api import SurveyedVm

_VERDICTS = {True: "yes", False: "no", None: "unknown"}


@click.command("ps", short_help="List the running VMs, and whether each can be snapshotted.")
@json_option
def command(as_json: bool) -> None:
    """List the running VMs, and whether each can be snapshotted, else why not.

    Asks each VM's monitor if it is free. The guests are not touched.
    """
    from stillframe import api

    vms = api.survey()
    Results(as_json=as_json).show(as_object(vms), _as_lines(vms))


def _leaves_out(vm: SurveyedVm) -> bool:
    return vm.without_disks and vm.snapshotable is True


def _as_lines(vms: list[SurveyedVm]) -> list[str]:
    lines = table(
        ("PID", "NAME", "VMM", "ACCEL", "RAM", "STATUS", "SNAPSHOT", "FROM", "THERE", "QMP"),
        [
            (
                str(vm.pid),
                vm.name or "-",
                f"{vm.vmm} {vm.version or '-'}",
                vm.accelerator,
                format_bytes(vm.ram_bytes),
                vm.status or "-",
                _VERDICTS[vm.snapshotable] + (", without disks" if _leaves_out(vm) else ""),
                Path(vm.restored_from).name if vm.restored_from else "-",
                "-" if vm.resident is None else f"{vm.resident:.0%}".replace("%", " %"),
                vm.qmp[0] if vm.qmp else "-",
            )
            for vm in vms
        ],
        right="PID,RAM,THERE",
    )
    for vm in vms:
        lines += [f"{vm.name or vm.pid}: {reason}" for reason in map(printable, vm.reasons)]
    return lines
