"""``stillframe repair``: repair a store."""

from __future__ import annotations

from contextlib import closing
from typing import TYPE_CHECKING

import click

from stillframe.cli.keys import key_options
from stillframe.cli.options import json_option, quiet_option, read_data_option, store_option
from stillframe.cli.output import Results, as_object
from stillframe.cli.progress import ByteRate, choose_progress
from stillframe.cli.text import printable
from stillframe.errors import DataError

if TYPE_CHECKING:
    from stillframe.api import Keys


@click.command("repair", short_help="Mend the store, and say what is lost.")
@read_data_option
@click.option("--forget", is_flag=True, help="Also remove the snapshots that something is lost of.")
@store_option
@quiet_option
@json_option
@key_options
@click.pass_context
def command(
    context: click.Context,
    read_data: float | None,
    forget: bool,
    quiet: bool,
    as_json: bool,
    keys: Keys,
) -> None:
    """Mend the store: the catalog anew from the snapshots themselves, and what processes left that
    died. Says what is lost, and keeps the rest.

    Ends with 8 if something is lost that --forget did not remove.
    """
    from stillframe import api

    with closing(choose_progress(quiet=quiet)) as progress:
        repair = api.repair(
            read_data=read_data or 0.0,
            forget=forget,
            progress=ByteRate(progress, "checking").update,
            keys=keys,
        )
    lines = list(repair.done)
    for one, whats in repair.lost.items():
        gone = "removed, lost" if one in repair.forgotten else "lost"
        lines += [f"{gone}: {repair.labels.get(one, one)}: {what}" for what in whats]
        if one in repair.needed:
            lines.append(f"stays: {repair.labels.get(one, one)}: {repair.needed[one]} needs it")
    Results(as_json=as_json).show(as_object(repair), map(printable, lines or ["nothing to mend"]))
    if set(repair.lost) - set(repair.forgotten):
        context.exit(DataError.exit_code)
