"""``stillframe export``: write a snapshot's content for other programs."""

from __future__ import annotations

from typing import TYPE_CHECKING

import click

from stillframe.cli.keys import key_options
from stillframe.cli.options import (
    force_option,
    json_option,
    output_option,
    parent_dir_option,
    quiet_option,
    store_option,
)
from stillframe.cli.output import Results
from stillframe.cli.parameters import SNAPSHOT, BlockType
from stillframe.cli.progress import ByteRate, choose_progress
from stillframe.cli.quantities import format_bytes
from stillframe.cli.text import FOR_ANALYSIS, facts

if TYPE_CHECKING:
    from stillframe.api import ExportFormat, Keys


@click.command("export", short_help="Write a snapshot in a form that other programs read.")
@click.argument("file", type=SNAPSHOT)
@click.option(
    "--format",
    "kind",
    type=click.Choice(["qemu", "raw", "elf", "libvirt", "libvirt-zstd", "still"]),
    required=True,
    help="qemu: the migration stream, for -incoming. raw: guest-physical memory, or one block."
    " elf: a core file for gdb, readelf and crash. still: of an increment and its parents one whole"
    " snapshot.",
)
@click.option("--block", type=BlockType(), metavar="NAME", help="With raw: only this RAM block.")
@output_option("The file to make; - is standard output.")
@force_option
@store_option
@quiet_option
@parent_dir_option
@json_option
@key_options
def command(
    file: str,
    kind: ExportFormat,
    block: str | None,
    output: str,
    force: bool,
    quiet: bool,
    as_json: bool,
    keys: Keys,
) -> None:
    """Write a snapshot's content in a form that other programs read.

    Zero pages are holes in a file, and zeroes in a pipe.
    """
    from stillframe import api

    written = 0
    progress = choose_progress(quiet=quiet)
    rate = ByteRate(progress, "exporting")

    def note(done_bytes: int) -> None:
        nonlocal written
        written = done_bytes
        rate.update(done_bytes)

    try:
        api.export(
            file,
            api.standard_output() if output == "-" else output,
            format=kind,
            block=block,
            keys=keys,
            overwrite=force,
            progress=note,
        )
    finally:
        progress.close()
    if output == "-" and not as_json:
        return
    data = {
        "file": None if output == "-" else output,
        "format": kind,
        "block": block,
        "written_bytes": written,
    }
    lines = facts([("exported", output), ("format", kind), ("written", format_bytes(written))])
    with api.open(file, keys=keys) as snapshot:
        if snapshot.manifest.for_analysis:
            lines.append(f"note: {FOR_ANALYSIS}")
    Results(as_json=as_json, to_stderr=output == "-").show(data, lines)
