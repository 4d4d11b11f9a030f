"""``stillframe check``: check a store."""

from __future__ import annotations

from contextlib import closing
from typing import TYPE_CHECKING

import click

from stillframe.cli.keys import key_options
from stillframe.cli.options import json_option, quiet_option, read_data_option, store_option
from stillframe.cli.output import Results, as_object
from stillframe.cli.progress import ByteRate, choose_progress
from stillframe.cli.quantities import format_bytes
from stillframe.cli.text import printable
from stillframe.errors import DataError

if TYPE_CHECKING:
    from stillframe.api import CheckReport, Keys

_WORDS = {
    "lost": "lost",
    "catalog": "the catalog is wrong, nothing is lost",
    "whole": "a whole form is damaged, nothing is lost",
    "orphan": "not in the catalog",
    "leftover": "left behind",
    "stray": "none of ours",
}


@click.command("check", short_help="Check the store: structure, digests, chains, leftovers.")
@read_data_option
@store_option
@quiet_option
@json_option
@key_options
@click.pass_context
def command(
    context: click.Context, read_data: float | None, quiet: bool, as_json: bool, keys: Keys
) -> None:
    """Check the store: structure, digests, chains, leftovers. Nothing is changed.

    Says which snapshots are affected by what. Ends with 8 unless the store is sound; 'stillframe
    repair' mends what can be mended.
    """
    from stillframe import api

    with closing(choose_progress(quiet=quiet)) as progress:
        report = api.check(
            read_data=read_data or 0.0, progress=ByteRate(progress, "checking").update, keys=keys
        )
    data = as_object(report) | {"sound": report.is_sound, "lost": report.lost}
    Results(as_json=as_json).show(data, map(printable, _as_lines(report)))
    if not report.is_sound:
        context.exit(DataError.exit_code)


def _as_lines(report: CheckReport) -> list[str]:
    lines: list[str] = []
    for finding in report.findings:
        lines.append(f"{_WORDS[finding.kind]}: {finding.key}: {finding.what}")
        lines += [f"  affects {report.labels.get(one, one)}" for one in finding.affects]
    read = f", {format_bytes(report.read_bytes)} of data read" if report.read_bytes else ""
    lines.append(
        f"{report.snapshots} snapshots looked at{read}: "
        + (
            f"{len(report.lost)} affected"
            if report.lost
            else "sound"
            if report.is_sound
            else "run 'stillframe repair'"
        )
    )
    return lines
