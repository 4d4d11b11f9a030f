"""``stillframe import``: a QEMU migration stream becomes a snapshot file."""

from __future__ import annotations

import sys
from typing import TYPE_CHECKING

import click

from stillframe.cli.options import (
    FILE,
    compression_option,
    force_option,
    json_option,
    output_option,
    quiet_option,
)
from stillframe.cli.output import Results
from stillframe.cli.progress import ByteRate, choose_progress
from stillframe.cli.text import facts
from stillframe.errors import UsageError

if TYPE_CHECKING:
    from stillframe.api import Compression, Source, StrPath


@click.command("import", short_help="Turn a QEMU migration stream into a snapshot file.")
@click.argument("stream", type=FILE, metavar="STREAM|-")
@output_option("The snapshot file to make; - is standard output.")
@compression_option
@force_option
@quiet_option
@json_option
def command(
    stream: str,
    output: str,
    compression: tuple[Compression, int | None],
    force: bool,
    quiet: bool,
    as_json: bool,
) -> None:
    """Turn a QEMU migration stream into a snapshot file.

    STREAM is a file, or - for standard input: what 'migrate' wrote to exec:, fd: or file:.
    """
    from stillframe import api

    progress = choose_progress(quiet=quiet)
    try:
        snapshot_id = api.import_stream(
            _source(stream),
            api.standard_output() if output == "-" else output,
            compression=compression[0],
            level=compression[1],
            overwrite=force,
            progress=ByteRate(progress, "importing").update,
        )
    finally:
        progress.close()
    data = {"id": snapshot_id, "file": "standard output" if output == "-" else output}
    Results(as_json=as_json, to_stderr=output == "-").show(
        data, facts([("snapshot", data["file"]), ("id", snapshot_id)])
    )


def _source(stream: str) -> StrPath | Source:
    if stream != "-":
        return stream
    if sys.stdin.isatty():
        raise UsageError(
            "standard input is a terminal", remedy="pipe a migration stream in, or name its file"
        )
    return sys.stdin.buffer
