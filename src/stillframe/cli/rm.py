"""``stillframe rm``: remove snapshots from a store."""

from __future__ import annotations

from typing import TYPE_CHECKING

import click

from stillframe.cli.keys import key_options
from stillframe.cli.options import json_option, store_option
from stillframe.cli.output import Results
from stillframe.cli.parameters import SNAPSHOT
from stillframe.cli.quantities import format_bytes
from stillframe.cli.text import printable

if TYPE_CHECKING:
    from stillframe.api import Keys


@click.command("rm", short_help="Remove snapshots from the store.")
@click.argument("names", nargs=-1, required=True, type=SNAPSHOT, metavar="NAME...")
@click.option("-n", "--dry-run", is_flag=True, help="Only show what would be removed.")
@store_option
@json_option
@key_options
def command(names: tuple[str, ...], dry_run: bool, as_json: bool, keys: Keys) -> None:
    """Remove snapshots from the store, with their disks: all of these or, if another snapshot or a
    VM needs one of them, none.

    NAME is an id, a short id, VM@latest, VM@TIME or VM@TAG; 'stillframe ls' lists them.
    """
    from stillframe import api

    removal = api.rm(*names, dry_run=dry_run, keys=keys)
    data = {
        "removed": [entry.id for entry in removal.removed],
        "freed_bytes": removal.freed_bytes,
        "dry_run": dry_run,
    }
    verb = "would remove" if dry_run else "removed"
    lines = [f"{verb} {one.label}, {format_bytes(one.own_bytes)}" for one in removal.removed]
    Results(as_json=as_json).show(data, map(printable, lines))
