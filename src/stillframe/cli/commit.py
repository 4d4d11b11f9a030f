"""``stillframe commit``: fold the overlays of a running VM's disks back."""

from __future__ import annotations

from contextlib import closing
from typing import TYPE_CHECKING

import click

from stillframe.cli.options import json_option, quiet_option
from stillframe.cli.output import Results
from stillframe.cli.parameters import VmType
from stillframe.cli.progress import choose_progress
from stillframe.cli.quantities import format_bytes
from stillframe.cli.text import printable

if TYPE_CHECKING:
    from stillframe.api import Fold


@click.command("commit", short_help="Fold the overlays of a running VM's disks back.")
@click.argument("vm", type=VmType())
@click.option("--dry-run", is_flag=True, help="Only show what would be folded.")
@click.option(
    "-f",
    "--force",
    is_flag=True,
    help="Also where a snapshot needs the image: it cannot be restored with its disks then.",
)
@quiet_option
@json_option
def command(vm: str, dry_run: bool, force: bool, quiet: bool, as_json: bool) -> None:
    """Fold the overlays that 'take --disks overlay' made back into the images below.

    VM is its QMP socket, host:port, pid or name. The guest runs on. Images that a snapshot needs
    stay as they are.
    """
    from stillframe import api

    with closing(choose_progress(quiet=quiet)) as progress:
        folds = api.commit(
            vm,
            dry_run=dry_run,
            force=force,
            progress=lambda done, total: progress.show("folding", done, total or None),
        )
    Results(as_json=as_json).show(
        [_as_json_object(one) for one in folds], _as_lines(folds, dry_run=dry_run)
    )


def _as_json_object(one: Fold) -> dict[str, object]:
    return {
        "disk": one.disk,
        "into": one.into,
        "overlays": list(one.overlays),
        "kept": list(one.kept),
        "needed_by": list(one.needed_by),
        "bytes": one.bytes,
    }


def _as_lines(folds: tuple[Fold, ...], *, dry_run: bool) -> list[str]:
    if not folds:
        return ["no disk has an overlay of ours"]
    lines = []
    for one in folds:
        if one.overlays:
            verb = "would be folded" if dry_run else "folded"
            count = f"{len(one.overlays)} overlay{'s' if len(one.overlays) > 1 else ''}"
            lines.append(f"{one.disk}: {count} ({format_bytes(one.bytes)}) {verb} into {one.into}")
        if one.kept:
            lines.append(
                f"{one.disk}: {one.into} stays as it is, needed by {', '.join(one.needed_by)}"
            )
    return [printable(line) for line in lines]
