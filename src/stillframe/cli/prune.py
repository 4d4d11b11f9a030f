"""``stillframe prune``: remove the snapshots that a policy does not keep."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import click

from stillframe.cli.keys import key_options
from stillframe.cli.options import json_option, keep_options, store_option
from stillframe.cli.output import Results
from stillframe.cli.quantities import format_bytes
from stillframe.cli.text import printable

if TYPE_CHECKING:
    from stillframe.api import Compaction, Keys


@click.command("prune", short_help="Remove the store's snapshots that a policy does not keep.")
@click.argument("vms", nargs=-1, metavar="[VM]...")
@keep_options
@click.option("-n", "--dry-run", is_flag=True, help="Only show what would be removed.")
@store_option
@json_option
@key_options
def command(
    vms: tuple[str, ...],
    keep: dict[str, Any],
    dry_run: bool,
    as_json: bool,
    keys: Keys,
) -> None:
    """Remove the store's snapshots that a policy does not keep, of each VM by itself.

    What is needed by a snapshot that is kept, or by a VM, stays. Long chains are made short
    before, so that a restore reads few files, and what is not kept can go. -1 keeps all.
    """
    from stillframe import api

    labels = {one.entry.id: one.entry.label for one in api.ls(keys=keys)}
    done = api.prune(*vms, dry_run=dry_run, keys=keys, **keep)
    data = {
        "removed": [entry.id for entry in done.removed],
        "kept": done.kept,
        "needed": done.needed,
        "freed_bytes": done.freed_bytes,
        "compacted": [entry.id for entry in done.compaction.compacted],
        "not_compacted": done.compaction.failed,
        "dry_run": dry_run,
    }
    verb = "would remove" if dry_run else "removed"
    kept = [(one, why) for one, why in done.kept.items()]
    kept += [(one, f"{who} needs it") for one, who in done.needed.items()]
    lines = [f"keeps {labels.get(one, one[:8])}: {why}" for one, why in kept]
    lines += compaction_lines(done.compaction, dry_run=dry_run)
    lines += [f"{verb} {one.label}, {format_bytes(one.own_bytes)}" for one in done.removed]
    total = len(kept) + len(done.removed)
    lines.append(
        f"{verb} {len(done.removed)} of {total} snapshots, {format_bytes(done.freed_bytes)}"
    )
    Results(as_json=as_json).show(data, map(printable, lines))


def compaction_lines(done: Compaction, *, dry_run: bool = False) -> list[str]:
    verb = "would compact" if dry_run else "compacted"
    lines = [f"{verb} {one.label}: it needs no parent then" for one in done.compacted]
    return lines + [f"cannot compact {one[:8]}: {why}" for one, why in done.failed.items()]
