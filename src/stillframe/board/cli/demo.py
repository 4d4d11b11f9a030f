"""``stillframe demo``: boards take background snapshots of themselves, and audits check them."""

from __future__ import annotations

import os
import shutil
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

import click

from stillframe.board.cli.half_blocks import Picture, cells, picture_lines
from stillframe.cli.options import json_option, quiet_option
from stillframe.cli.output import Results, write_result
from stillframe.cli.parameters import FILE
from stillframe.cli.quantities import format_bytes, format_ms
from stillframe.cli.text import facts, is_capable, wants_colour
from stillframe.errors import SinkError

if TYPE_CHECKING:
    from stillframe.board.cli.demo_ledger import LedgerResult
    from stillframe.board.cli.demo_life import LifeResult

_GAP = 3
_ROWS = 18


@click.command("demo", short_help="Snapshot a running VM, restore it, and audit both.")
@click.option(
    "-o",
    "--output",
    type=FILE,
    metavar="DIRECTORY",
    help="Where the two pictures go; else a new directory for temporary files.",
)
@quiet_option
@json_option
def command(output: str | None, quiet: bool, as_json: bool) -> None:
    """Snapshot a running VM in the background, restore it, and audit both.

    Runs small guests on boards of our own: neither root nor QEMU is needed. Ends with 11 if an
    audit fails.
    """
    from stillframe import board
    from stillframe.board.cli.demo_ledger import run_ledger
    from stillframe.board.cli.demo_life import run_life
    from stillframe.restore.private_directories import work_directory

    board.check()
    tell = _silent if quiet or as_json else _tell
    _check_directory(output)
    with work_directory("demo") as place:
        ledger = run_ledger(place, tell)
        life = _keep(run_life(place, tell), output)
    Results(as_json=as_json).show(_as_json_object(ledger, life), _as_lines(ledger, life))


def _tell(line: str) -> None:
    write_result(f"{line}\n", sys.stdout)


def _silent(line: str) -> None:
    pass


def _check_directory(output: str | None) -> None:
    """Check at the start that the pictures have a place to go.

    Raises:
        SinkError: they have none.
    """
    if output is None:
        return
    place = Path(output).absolute()
    while not place.exists() and place != place.parent:
        place = place.parent
    if not place.is_dir():
        raise SinkError(f"no place for the pictures in {output}", why=f"{place} is no directory")
    if not os.access(place, os.W_OK | os.X_OK):
        raise SinkError(f"no place for the pictures in {output}", why=f"{place} is not writable")


def _keep(life: LifeResult, output: str | None) -> LifeResult:
    """Move the pictures to their directory, made only now that there are some."""
    import msgspec

    try:
        if output is None:
            place = Path(tempfile.mkdtemp(prefix="stillframe-demo-pictures-"))
        else:
            place = Path(output)
            place.mkdir(parents=True, exist_ok=True)
        kept = [
            shutil.move(file, place / Path(file).name)
            for file in (life.instant_file, life.now_file)
        ]
    except OSError as error:
        raise SinkError("the pictures cannot be kept", why=error.strerror) from error
    instant_file, now_file = map(str, kept)
    return msgspec.structs.replace(life, instant_file=instant_file, now_file=now_file)


def _as_json_object(ledger: LedgerResult, life: LifeResult) -> dict[str, object]:
    numbers = ledger.numbers
    return {
        "sound": True,
        "protection": ledger.protection,
        "downtime_ms": numbers["downtime_ms"],
        "total_ms": numbers["total_ms"],
        "ram_bytes": numbers["ram_bytes"],
        "file_bytes": ledger.file_bytes,
        "pages": numbers["pages"],
        "faults": numbers["faults"],
        "fault_p50_us": numbers["fault_p50_us"],
        "fault_max_us": numbers["fault_max_us"],
        "progress": ledger.progress,
        "transfers_at_instant": ledger.transfers_at_instant,
        "transfers_now": ledger.transfers_now,
        "audits": ledger.audits,
        "pictures": {"instant": life.instant_file, "now": life.now_file},
    }


def _as_lines(ledger: LedgerResult, life: LifeResult) -> Iterator[str]:
    numbers, pages = ledger.numbers, ledger.numbers["pages"]
    yield ""
    yield from _art(life)
    yield from facts(
        [
            ("downtime", f"{format_ms(numbers['downtime_ms'])}: the vCPUs were stopped"),
            (
                "snapshot",
                f"{format_bytes(numbers['ram_bytes'])} of RAM in {format_ms(numbers['total_ms'])},"
                f" {format_bytes(ledger.file_bytes)} written while the guest ran",
            ),
            ("progress", f"{100 * ledger.progress:.0f} % of free running, meanwhile"),
            (
                "pages",
                f"{pages['total']}: {pages['data']} data, {pages['zero']} zero;"
                f" {pages['faulted']} saved first, as the guest was about to overwrite them",
            ),
            (
                "faults",
                f"{numbers['faults']}: median {numbers['fault_p50_us']:.0f} µs,"
                f" longest {numbers['fault_max_us']:.0f} µs",
            ),
            ("protection", ledger.protection),
            ("transfers", f"{ledger.transfers_at_instant} in the snapshot,"
                          f" {ledger.transfers_now} now"),
            ("audits", "both ok: every page is of one instant, and no money is missing"),
            ("pictures", f"{life.instant_file}, {life.now_file}"),
        ]
    )  # fmt: skip


def _art(life: LifeResult) -> Iterator[str]:
    """Yield both pictures side by side, if standard output is a terminal."""
    if not sys.stdout.isatty() or not is_capable():
        return
    columns = (min(shutil.get_terminal_size().columns, 120) - _GAP) // 2
    colour = wants_colour(sys.stdout)
    pictures = [Picture.from_ppm(content) for content in (life.instant, life.now)]
    width = cells(pictures[0], columns, _ROWS)[0]
    yield "at the instant".ljust(width + _GAP) + "now"
    drawn = (picture_lines(picture, columns, _ROWS, colour=colour) for picture in pictures)
    yield from (left + " " * _GAP + right for left, right in zip(*drawn, strict=True))
    yield ""
