"""``stillframe doctor``: diagnose the host, or a VM."""

from __future__ import annotations

from typing import TYPE_CHECKING

import click

from stillframe.cli.options import json_option
from stillframe.cli.output import Results
from stillframe.cli.parameters import VmType
from stillframe.cli.text import Colour, paint, printable
from stillframe.errors import HostError, RefusedError

if TYPE_CHECKING:
    from stillframe.api import Check, CheckStatus

_COLOURS: dict[CheckStatus, Colour] = {"ok": "green", "warn": "yellow", "fail": "red"}


@click.command("doctor", short_help="Look at the host, or a VM, and say what to mend.")
@click.argument("vm", type=VmType(), required=False)
@json_option
@click.pass_context
def command(context: click.Context, vm: str | None, as_json: bool) -> None:
    """Look at the host, and at VM if it is named, and say what to mend.

    Ends with 0 if a background snapshot can be taken, 5 if the host lacks something, and 3 if
    the VM stands in the way itself. Neither host nor guest is changed.
    """
    from stillframe import api

    checks = api.doctor(vm)
    failed = {check.subject for check in checks if check.status == "fail"}
    data = {
        "fine": not failed,
        "checks": [
            {
                "subject": check.subject,
                "name": check.name,
                "status": check.status,
                "found": check.found,
                "remedy": check.remedy or None,
            }
            for check in checks
        ],
    }
    Results(as_json=as_json).show(data, _as_lines(checks))
    if failed:
        context.exit(HostError.exit_code if "host" in failed else RefusedError.exit_code)


def _as_lines(checks: list[Check]) -> list[str]:
    width = max(len(check.name) for check in checks)
    lines: list[str] = []
    subject = ""
    for check in checks:
        if check.subject != subject:
            subject = check.subject
            lines.append(paint("Host" if subject == "host" else "VM", "bold"))
        mark = paint(check.status.ljust(4), _COLOURS[check.status])
        lines.append(f"  {mark}  {printable(check.name).ljust(width)}  {printable(check.found)}")
        if check.remedy:
            lines.append(f"  {' ' * 4}  {' ' * width}  -> {printable(check.remedy)}")
    return lines
