"""``stillframe ps``: the running VMs."""

from __future__ import annotations

from typing import TYPE_CHECKING

import click

from stillframe.cli.options import json_option
from stillframe.cli.output import Results
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
    Results(as_json=as_json).show([_as_json_object(vm) for vm in vms], _as_lines(vms))


def _as_json_object(vm: SurveyedVm) -> dict[str, object]:
    return {
        "pid": vm.pid,
        "name": vm.name,
        "uid": vm.uid,
        "vmm": vm.vmm,
        "version": vm.version,
        "qemu_version": vm.version if vm.vmm == "qemu" else None,
        "accelerator": vm.accelerator,
        "ram_bytes": vm.ram_bytes,
        "qmp": list(vm.qmp),
        "status": vm.status,
        "snapshotable": vm.snapshotable,
        "reasons": list(vm.reasons),
    }


def _as_lines(vms: list[SurveyedVm]) -> list[str]:
    lines = table(
        ("PID", "NAME", "VMM", "ACCEL", "RAM", "STATUS", "SNAPSHOT", "QMP"),
        [
            (
                str(vm.pid),
                vm.name or "-",
                f"{vm.vmm} {vm.version or '-'}",
                vm.accelerator,
                format_bytes(vm.ram_bytes),
                vm.status or "-",
                _VERDICTS[vm.snapshotable],
                vm.qmp[0] if vm.qmp else "-",
            )
            for vm in vms
        ],
        right="PID,RAM",
    )
    for vm in vms:
        lines += [f"{vm.name or vm.pid}: {reason}" for reason in map(printable, vm.reasons)]
    return lines
