"""``stillframe copy``: copy snapshots from one store into another."""

from __future__ import annotations

from contextlib import closing
from typing import TYPE_CHECKING

import click

from stillframe.cli.keys import key_options
from stillframe.cli.options import json_option, quiet_option, store_option
from stillframe.cli.output import Results
from stillframe.cli.parameters import SNAPSHOT
from stillframe.cli.progress import ByteRate, choose_progress
from stillframe.cli.quantities import format_bytes
from stillframe.cli.text import printable

if TYPE_CHECKING:
    from stillframe.api import Keys


@click.command("copy", short_help="Copy snapshots into another store.")
@click.argument("names", nargs=-1, type=SNAPSHOT, metavar="[NAME]...")
@click.option("--to", "target", required=True, metavar="STORE", help="The other store.")
@click.option("-n", "--dry-run", is_flag=True, help="Only show what would be copied.")
@store_option
@quiet_option
@json_option
@key_options
def command(
    names: tuple[str, ...], target: str, dry_run: bool, quiet: bool, as_json: bool, keys: Keys
) -> None:
    """Copy snapshots of the store into another one, which has to be there: all, or these with what
    they build on. What is there already is not sent again."""
    from stillframe import api

    with closing(choose_progress(quiet=quiet)) as progress:
        step = ByteRate(progress, "copying").update
        done = api.copy(*names, to=target, keys=keys, dry_run=dry_run, progress=step)
    data = {
        "copied": [entry.id for entry in done.copied],
        "there": [entry.id for entry in done.there],
        "copied_bytes": done.copied_bytes,
        "dry_run": dry_run,
    }
    verb = "would copy" if dry_run else "copied"
    lines = [f"{verb} {one.label}, {format_bytes(one.own_bytes)}" for one in done.copied]
    if done.there:
        lines.append(f"{len(done.there)} were there already")
    Results(as_json=as_json).show(data, map(printable, lines or ["nothing to copy"]))
