"""``stillframe image``: list, add and remove complete images, on which VMs start."""

from __future__ import annotations

from contextlib import closing, suppress
from typing import TYPE_CHECKING

import click

from stillframe.cli.keys import key_options
from stillframe.cli.options import json_option, parent_dir_option, quiet_option, store_option
from stillframe.cli.output import Results
from stillframe.cli.parameters import IMAGES, SNAPSHOT
from stillframe.cli.progress import ByteRate, choose_progress
from stillframe.cli.quantities import format_bytes
from stillframe.cli.text import table
from stillframe.errors import BusyError, NotFoundError, UsageError

if TYPE_CHECKING:
    from stillframe.api import Keys, StoredImage


@click.group("image", short_help="List, add and remove complete images of snapshots.")
def command() -> None:
    """List, add and remove complete images of snapshots.

    Such an image is the RAM of a snapshot, decompressed, on a disk of this host. 'restore' and
    'fork' start VMs on it, if there is one: nothing has to be filled. The snapshot itself is not
    changed, and is needed as before.
    """


@command.command("ls", short_help="List the images.")
@json_option
def ls(as_json: bool) -> None:
    """List the images, the last used one first."""
    from stillframe import api

    images, limit_bytes = api.images(), api.image_limit()
    total_bytes = sum(image.size_bytes for image in images)
    rows = [
        (
            image.id[:12],
            format_bytes(image.size_bytes),
            f"{image.used[:19]}Z",
            "damaged" if not image.is_sound else "in use" if image.in_use else "",
            image.vm,
            image.snapshot,
        )
        for image in images
    ]
    lines = table(("ID", "SIZE", "USED", "STATE", "VM", "SNAPSHOT"), rows, right="SIZE")
    lines.append(f"{format_bytes(total_bytes)} of {format_bytes(limit_bytes)}")
    Results(as_json=as_json).show(
        {
            "images": [_as_object(image) for image in images],
            "size_bytes": total_bytes,
            "limit_bytes": limit_bytes,
        },
        lines,
    )


@command.command("add", short_help="Make the image of a snapshot.")
@click.argument("file", type=SNAPSHOT)
@store_option
@quiet_option
@parent_dir_option
@json_option
@key_options
def add(file: str, quiet: bool, as_json: bool, keys: Keys) -> None:
    """Make the image of a snapshot, unless there is one; 'take --image' makes it in its own pass.

    What was not used for longest is removed, where the limit would be passed.
    """
    from stillframe import api

    with closing(choose_progress(quiet=quiet)) as progress:
        image = api.add_image(
            file,
            keys=keys,
            progress=ByteRate(progress, "decompressing").update,
        )
    line = f"{image.id[:12]}, {format_bytes(image.size_bytes)}"
    Results(as_json=as_json).show(_as_object(image), [line])


@command.command("rm", short_help="Remove images.")
@click.argument("names", nargs=-1, metavar="[ID...]")
@click.option("--unused", is_flag=True, help="All on which no VM runs.")
@json_option
def rm(names: tuple[str, ...], unused: bool, as_json: bool) -> None:
    """Remove images, as 'image ls' shows them; their snapshots stay. None on which a VM runs."""
    from stillframe import api

    if unused == bool(names):
        raise UsageError("name images by their ids, or say --unused")
    removed = _removed_unused() if unused else api.rm_images(*names)
    Results(as_json=as_json).show(
        [_as_object(image) for image in removed],
        [f"removed {image.id[:12]}, {format_bytes(image.size_bytes)}" for image in removed]
        or ["nothing to remove"],
    )


@command.command("limit", short_help="Show or set the size limit.")
@click.argument("size", type=IMAGES, metavar="[SIZE]", required=False)
@json_option
def limit(size: int | None, as_json: bool) -> None:
    """Show what all images together may take on the disk, or set it to SIZE, such as 40G."""
    from stillframe import api

    limit_bytes = api.image_limit(size)
    Results(as_json=as_json).show({"limit_bytes": limit_bytes}, [format_bytes(limit_bytes)])


def _removed_unused() -> list[StoredImage]:
    from stillframe import api

    removed: list[StoredImage] = []
    for image in api.images():
        with suppress(BusyError, NotFoundError):  # in use or gone since the listing
            removed += [] if image.in_use else api.rm_images(image.id)
    return removed


def _as_object(image: StoredImage) -> dict[str, object]:
    return {
        "id": image.id,
        "vm": image.vm,
        "snapshot": image.snapshot,
        "created": image.created,
        "used": image.used,
        "size_bytes": image.size_bytes,
        "in_use": image.in_use,
        "is_sound": image.is_sound,
    }
