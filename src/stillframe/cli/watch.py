"""``stillframe watch``: snapshot a VM on a schedule, at the cost of what changed."""

from __future__ import annotations

import json
import sys
import threading
from typing import TYPE_CHECKING, Any

import click

from stillframe.cli.cancelling import CancelRequests
from stillframe.cli.keys import key_options
from stillframe.cli.options import (
    compression_option,
    disks_option,
    json_option,
    keep_options,
    quiet_option,
    spill_option,
    store_option,
)
from stillframe.cli.output import as_object, say, write_result
from stillframe.cli.parameters import DURATION, VmType
from stillframe.cli.quantities import format_bytes, format_ms
from stillframe.cli.text import printable

if TYPE_CHECKING:
    from stillframe import api
    from stillframe.api import Compression, DiskKind, Keys, TakenSnapshot
    from stillframe.errors import StillframeError


@click.command("watch", short_help="Snapshot a VM on schedule, at the cost of what changed.")
@click.argument("vm", type=VmType())
@click.option(
    "--every",
    type=DURATION,
    default="10m",
    show_default=True,
    help="From the beginning of one snapshot to that of the next: 30s, 10m, 2h, 1d.",
)
@click.option("--count", type=click.IntRange(min=1), metavar="N", help="End after N snapshots.")
@keep_options
@click.option(
    "--max-away",
    type=DURATION,
    help="End if the VM is away for so long.  [default: wait for ever]",
)
@disks_option(["copy", "none"], "The VM's disks at each instant: copied, as a whole; or left out.")
@compression_option
@spill_option()
@store_option
@quiet_option
@json_option
@key_options
def command(
    vm: str,
    every: float,
    count: int | None,
    keep: dict[str, Any],
    max_away: float | None,
    disks: DiskKind,
    compression: tuple[Compression, int | None],
    spill: int,
    quiet: bool,
    as_json: bool,
    keys: Keys,
) -> None:
    """Snapshot a VM on schedule into the store, at the cost of what changed.

    VM is its name, QMP socket, host:port or pid. Between two snapshots its RAM stays
    write-protected, and what is written is noted: the next one reads only that. With --keep-...
    older ones go as with 'stillframe prune'. Ctrl-C or SIGTERM ends it; the guest runs on.
    """
    from stillframe import api

    stop = threading.Event()
    with CancelRequests(on_request=stop.set):
        api.watch(
            vm,
            every_s=every,
            count=count,
            compression=compression[0],
            level=compression[1],
            spill_bytes=spill,
            disks=disks,
            most_away_s=max_away,
            keys=keys,
            stop=stop,
            follower=_follower(quiet=quiet, as_json=as_json),
            **keep,
        )


def _follower(*, quiet: bool, as_json: bool) -> api.Follower:
    from stillframe import api

    class Told(api.Follower):
        def taken(self, snapshot: TakenSnapshot, *, tracked: bool) -> None:
            if as_json:
                line = json.dumps(as_object(snapshot) | {"tracked": tracked})
            else:
                line = printable(_line(snapshot, tracked))
            if as_json or not quiet:
                write_result(f"{line}\n", sys.stdout)

        def failed(self, error: StillframeError) -> None:
            say(f"stillframe: {error}; the watch goes on")

        def interrupted(self, why: str) -> None:
            say(f"stillframe: tracking was interrupted: {why}")

        def gone(self, error: StillframeError) -> None:
            say(f"stillframe: waiting for the VM: {error}")

    return Told()


def _line(snapshot: TakenSnapshot, tracked: bool) -> str:
    numbers = snapshot.statistics
    pages = numbers.pages
    how = "of what was written" if tracked else "of all of RAM"
    return (
        f"{snapshot.id[:8]}  {format_bytes(numbers.file_bytes)},"
        f" {format_bytes(4096 * (pages.data + pages.zero))} {how},"
        f" downtime {format_ms(numbers.downtime_ms)}, took {format_ms(numbers.total_ms)}"
    )
