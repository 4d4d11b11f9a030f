"""The demo's first act: money moves between accounts across RAM, and a snapshot must lose none."""

from __future__ import annotations

import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import msgspec

from stillframe.board.cli.demo_board import DemoBoard, number
from stillframe.errors import SnapshotFailed

RAM_MIB = 128
VCPUS = 2
RATE_MIB_PER_S = 20
FREE_S = 1.2
GO_ON_S = 0.6
_TICK_MS = 20
_READY, _AUDIT = "ledger ready", "AUDIT"

Say = Callable[[str], None]


class LedgerResult(msgspec.Struct, frozen=True, kw_only=True):
    """The first act's results. Transfers are the guest's own count.

    ``numbers``: the migration's statistics, as ``take`` gives them. ``progress``: transfers per
    second during the snapshot, divided by those before. ``audits``: the guests' answers.
    """

    protection: str
    numbers: dict[str, Any]
    file_bytes: int
    progress: float
    transfers_at_instant: int
    transfers_now: int
    audits: dict[str, str]


def run_ledger(directory: Path, say: Say) -> LedgerResult:
    """Play the first act.

    Args:
        directory: for sockets and the snapshot.

    Raises:
        SnapshotFailed: an audit failed. MachineError: a board failed or did not answer.
    """
    file = directory / "ledger.stream"
    words = ("ledger", "--ram", f"{RAM_MIB}M", "--cpus", str(VCPUS))
    options = f"rate={RATE_MIB_PER_S} tick_ms={_TICK_MS}"
    say(
        f"1. A board with {VCPUS} vCPUs and {RAM_MIB} MiB of RAM runs 'ledger': accounts on all"
        f" pages, {RATE_MIB_PER_S} MiB of them written every second"
    )
    with DemoBoard(directory, "first", *words, "--append", options) as first:
        first.qmp("cont")
        say(f"   {first.console.wait(_READY)}")
        began_s = time.monotonic()
        time.sleep(FREE_S)
        free = _transfers_per_s(first, began_s, time.monotonic())

        say("2. It takes a background snapshot of itself while money moves")
        began_s = time.monotonic()
        info = first.snapshot(file)
        ended_s = time.monotonic()
        time.sleep(2 * _TICK_MS / 1000)
        during = _transfers_per_s(first, began_s, ended_s)

        say("3. It goes on, and a second board starts from the snapshot")
        time.sleep(GO_ON_S)
        with DemoBoard(directory, "second", *words, "--incoming", f"file:{file}") as second:
            second.wait_loaded()
            second.qmp("cont")
            say("4. Both check that every page is of one instant, and that no money is missing")
            audits = {board.name: board.console.ask("a", _AUDIT) for board in (first, second)}
    for name, audit in audits.items():
        say(f"   {name:<6} {audit}")
        if not audit.startswith("AUDIT ok"):
            raise SnapshotFailed(f"the audit of the {name} board failed", why=audit)
    numbers = dict(info["x-stillframe"])
    return LedgerResult(
        protection=str(numbers["protection"]),
        numbers=numbers,
        file_bytes=file.stat().st_size,
        progress=during / free if free else 0.0,
        transfers_at_instant=number(audits["second"], "transfers"),
        transfers_now=number(audits["first"], "transfers"),
        audits=audits,
    )


def _transfers_per_s(board: DemoBoard, since_s: float, until_s: float) -> float:
    """Return the rate between the last tick before and the first after that time.

    A tick may well be late, so the ticks' own times count.
    """
    ticks = board.console.lines("tick")
    before = [tick for tick in ticks if tick[0] <= since_s] or ticks[:1]
    after = [tick for tick in ticks if tick[0] >= until_s] or ticks[-1:]
    (first_s, first), (last_s, last) = before[-1], after[0]
    if last_s <= first_s:
        return 0.0
    return (number(last, "transfers") - number(first, "transfers")) / (last_s - first_s)
