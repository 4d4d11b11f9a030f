"""``stillframe ls``: list the snapshots of a store."""

from __future__ import annotations

from typing import TYPE_CHECKING

import click

from stillframe.cli.keys import key_options
from stillframe.cli.options import json_option, store_option
from stillframe.cli.output import Results, as_object
from stillframe.cli.quantities import format_bytes
from stillframe.cli.text import table

if TYPE_CHECKING:
    from stillframe.api import Keys, ListedSnapshot


@click.command("ls", short_help="List the snapshots of the store.")
@click.argument("vms", nargs=-1, metavar="[VM]...")
@store_option
@json_option
@key_options
def command(vms: tuple[str, ...], as_json: bool, keys: Keys) -> None:
    """List the snapshots of the store, of all VMs or of these: the oldest first, what builds on a
    snapshot below it."""
    from stillframe import api

    found = api.ls(*vms, keys=keys)
    Results(as_json=as_json).show([_as_json_object(one) for one in found], _as_lines(found))


def _as_json_object(one: ListedSnapshot) -> dict[str, object]:
    data: dict[str, object] = as_object(one.entry)
    del data["format"], data["name"]
    return data | {
        "short_id": one.entry.short_id,
        "own_bytes": one.own_bytes,
        "whole": one.is_whole,
        "shared_bytes": one.shared_bytes,
        "tags": list(one.tags),
    }


def _as_lines(found: list[ListedSnapshot]) -> list[str]:
    if not found:
        return ["no snapshots"]
    return table(
        ("VM", "ID", "TIME", "SIZE", "SHARED", "TAGS"),
        [
            (
                one.entry.vm,
                f"{'  ' * (one.depth - 1)}└ {one.entry.short_id}" * (one.depth > 0)
                or one.entry.short_id,
                f"{one.entry.time.astimezone():%Y-%m-%d %H:%M:%S}",
                format_bytes(one.own_bytes),
                format_bytes(one.shared_bytes) if one.shared_bytes else "-",
                ", ".join(one.tags),
            )
            for one in found
        ],
        right="SIZE,SHARED",
    )
