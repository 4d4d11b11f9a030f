"""``stillframe tag``: add and remove tags of a snapshot in a store."""

from __future__ import annotations

from typing import TYPE_CHECKING

import click

from stillframe.cli.keys import key_options
from stillframe.cli.options import json_option, store_option
from stillframe.cli.output import Results
from stillframe.cli.parameters import SNAPSHOT

if TYPE_CHECKING:
    from stillframe.api import Keys


@click.command("tag", short_help="Give a snapshot of the store tags, or take some off.")
@click.argument("name", type=SNAPSHOT, metavar="NAME")
@click.argument("tags", nargs=-1, metavar="[TAG]...")
@click.option("--add", multiple=True, metavar="TAG", help="As TAG: give it this one.")
@click.option("--remove", multiple=True, metavar="TAG", help="Take this one off.")
@store_option
@json_option
@key_options
def command(
    name: str,
    tags: tuple[str, ...],
    add: tuple[str, ...],
    remove: tuple[str, ...],
    as_json: bool,
    keys: Keys,
) -> None:
    """Give a snapshot of the store tags, or take some off; VM@TAG names it then.

    Shows the tags that it has afterwards.
    """
    from stillframe import api

    found = api.tag(name, *tags, *add, remove=remove, keys=keys)
    Results(as_json=as_json).show({"tags": list(found)}, [", ".join(found) or "no tags"])
