"""``stillframe import``: turn a QEMU migration stream into a snapshot."""

from __future__ import annotations

import sys
from contextlib import closing
from typing import TYPE_CHECKING

import click

from stillframe.cli.keys import encrypt_with_keys_options
from stillframe.cli.options import (
    compression_option,
    force_option,
    json_option,
    output_option,
    quiet_option,
    store_option,
)
from stillframe.cli.output import Results
from stillframe.cli.parameters import FILE
from stillframe.cli.progress import ByteRate, choose_progress
from stillframe.cli.text import facts
from stillframe.errors import UsageError

if TYPE_CHECKING:
    from stillframe.api import Compression, DataKey, Keys, Source, StrPath


@click.command("import", short_help="Turn a QEMU migration stream into a snapshot.")
@click.argument("stream", type=FILE, metavar="STREAM|-")
@output_option(
    "The snapshot file to make; - is standard output.  [default: it goes into the store]",
    required=False,
)
@store_option
@click.option("--tag", "tags", multiple=True, help="Of the snapshot in the store.")
@compression_option
@force_option
@quiet_option
@json_option
@encrypt_with_keys_options
def command(
    stream: str,
    output: str | None,
    tags: tuple[str, ...],
    compression: tuple[Compression, int | None],
    force: bool,
    quiet: bool,
    as_json: bool,
    key: DataKey | None,
    keys: Keys,
) -> None:
    """Turn a QEMU migration stream into a snapshot: of the store, as VM 'import', or a file.

    STREAM is a file, or - for standard input: what 'migrate' wrote to exec:, fd: or file:.
    """
    from stillframe import api

    with closing(choose_progress(quiet=quiet)) as progress:
        snapshot_id = api.import_stream(
            _source(stream),
            api.standard_output() if output == "-" else output,
            tags=tags,
            compression=compression[0],
            level=compression[1],
            key=key,
            keys=keys,
            overwrite=force,
            progress=ByteRate(progress, "importing").update,
        )
    file = "standard output" if output == "-" else output
    if file is None:
        file = str(api.locate(snapshot_id, keys=keys))
    data = {"id": snapshot_id, "file": file}
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
