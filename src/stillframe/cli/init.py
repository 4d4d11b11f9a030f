"""``stillframe init``: make a store."""

from __future__ import annotations

from typing import TYPE_CHECKING

import click

from stillframe.cli.keys import encrypt_with_keys_options
from stillframe.cli.options import json_option
from stillframe.cli.output import Results
from stillframe.cli.parameters import FILE
from stillframe.cli.text import facts

if TYPE_CHECKING:
    from stillframe.api import DataKey, Keys


@click.command("init", short_help="Make a store for snapshots.")
@click.argument("location", required=False, type=FILE, metavar="[PATH|URL]")
@click.option(
    "--append-only", is_flag=True, help="Nothing is ever removed from it: no rm, no prune."
)
@click.option(
    "--full-every",
    type=click.IntRange(min=1),
    metavar="N",
    help="At most so many snapshots build on each other; then comes a full one.  [default: 32]",
)
@click.option(
    "--keys-of",
    type=FILE,
    metavar="STORE",
    help="Encrypt it with the keys of that store, so that 'copy' can move snapshots.",
)
@json_option
@encrypt_with_keys_options
def command(
    location: str | None,
    append_only: bool,
    full_every: int | None,
    keys_of: str | None,
    as_json: bool,
    key: DataKey | None,
    keys: Keys,
) -> None:
    """Make a store, which holds the snapshots of many VMs.

    Without PATH it is the one that $STILLFRAME_STORE names, else a folder of your state
    directory; 'take' without -o goes there.
    """
    from stillframe import api

    other = None if keys_of is None else api.open_store(keys_of, keys=keys)
    store = api.init(
        location, append_only=append_only, full_every=full_every, key=key, keys_of=other
    )
    data = {
        "store": store.description,
        "id": store.config.id,
        "append_only": store.config.append_only,
        "full_every": store.config.full_every,
        "encrypted": store.key is not None,
    }
    rows = [("store", store.description), ("id", store.config.id)]
    if store.config.append_only:
        rows.append(("append-only", "nothing is ever removed from it"))
    if store.key is not None:
        rows.append(("encrypted", "only sizes and times can be read without a key"))
    Results(as_json=as_json).show(data, facts(rows))
