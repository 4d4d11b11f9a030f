"""``stillframe kill``: end VMs that ``restore`` or ``fork`` started."""

from __future__ import annotations

import click

from stillframe.cli.options import json_option
from stillframe.cli.output import Results
from stillframe.cli.parameters import VmType
from stillframe.cli.text import printable


@click.command("kill", short_help="End VMs that 'restore' or 'fork' started.")
@click.argument("vms", metavar="VM...", nargs=-1, required=True, type=VmType())
@json_option
def command(vms: tuple[str, ...], as_json: bool) -> None:
    """End VMs that 'restore' or 'fork' started, and remove their sockets, logs and overlays.

    VM is a name, a pid or a QMP socket; 'stillframe ps' lists them. What their guests have not
    saved elsewhere is lost. If one of them is not found, none is ended.
    """
    from stillframe import api

    ended = api.kill(*vms)
    Results(as_json=as_json).show(
        [{"pid": vm.pid, "name": vm.name} for vm in ended],
        [f"ended {printable(vm.name) or 'VM'} (pid {vm.pid})" for vm in ended],
    )
