"""``stillframe verify``: check a snapshot file."""

from __future__ import annotations

from contextlib import closing
from typing import TYPE_CHECKING

import click

from stillframe.cli.keys import key_options
from stillframe.cli.options import json_option, parent_dir_option, quiet_option, store_option
from stillframe.cli.output import Results
from stillframe.cli.parameters import SNAPSHOT
from stillframe.cli.progress import ByteRate, choose_progress
from stillframe.cli.quantities import format_bytes
from stillframe.cli.text import FOR_ANALYSIS, facts

if TYPE_CHECKING:
    from stillframe.api import Keys


@click.command("verify", short_help="Check every digest of a snapshot, and its stream.")
@click.argument("file", type=SNAPSHOT)
@store_option
@quiet_option
@parent_dir_option
@json_option
@key_options
def command(file: str, quiet: bool, as_json: bool, keys: Keys) -> None:
    """Check every digest of a snapshot, and that its stream parses to its end."""
    from stillframe import api

    with closing(choose_progress(quiet=quiet)) as progress:
        report = api.verify(file, keys=keys, progress=ByteRate(progress, "verifying").update)
    data = {
        "file": file,
        "sound": True,
        "id": report.id,
        "frames": report.frames,
        "file_payload_bytes": report.stored_bytes,
        "stream_bytes": report.stream_bytes,
        "pages": {
            "data": report.data_pages,
            "zero": report.zero_pages,
            "missing": report.missing_pages,
            "superseded": report.superseded_pages,
        },
        "devices": list(report.devices),
        "has_description": report.has_description,
        "for_analysis": report.for_analysis,
    }
    pages = f"{report.data_pages} data, {report.zero_pages} zero"
    if report.missing_pages:
        pages += f", {report.missing_pages} missing (the imported stream lacks them)"
    if report.superseded_pages:
        pages += f", {report.superseded_pages} sent again later"
    lines = facts(
        [
            ("snapshot", file),
            ("id", report.id),
            ("frames", f"{report.frames}, {format_bytes(report.stored_bytes)}"),
            (
                "stream",
                f"{format_bytes(report.stream_bytes)}, {len(report.devices)} device sections",
            ),
            ("pages", pages),
            ("result", f"sound, but {FOR_ANALYSIS}" if report.for_analysis else "sound"),
        ]
    )
    Results(as_json=as_json).show(data, lines)
