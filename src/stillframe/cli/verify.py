"""``stillframe verify``: is a snapshot file sound?"""

from __future__ import annotations

import click

from stillframe.cli.options import FILE, json_option, quiet_option
from stillframe.cli.output import Results
from stillframe.cli.progress import ByteRate, choose_progress
from stillframe.cli.quantities import format_bytes
from stillframe.cli.text import facts


@click.command("verify", short_help="Check every digest of a snapshot, and its stream.")
@click.argument("file", type=FILE)
@quiet_option
@json_option
def command(file: str, quiet: bool, as_json: bool) -> None:
    """Check every digest of a snapshot, and that its stream parses to its end."""
    from stillframe import api

    progress = choose_progress(quiet=quiet)
    try:
        report = api.verify(file, progress=ByteRate(progress, "verifying").update)
    finally:
        progress.close()
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
            ("result", "sound"),
        ]
    )
    Results(as_json=as_json).show(data, lines)
