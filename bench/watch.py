"""What a watched VM costs: per snapshot, and per size of RAM with the same changes; and its guest.

    python -m bench.watch [--ram 1024,4096] [--populate SHARE] [--rate MIB_PER_S] [--every S]
                          [--count N] [--json FILE]

For each size of RAM one QEMU, whose guest fills a share of it and then rewrites the same 32 MiB at
the given rate. Prints the median of what a tracked snapshot took, read and wrote, its downtime, and
how far the guest came between snapshots, in parts of what it did unwatched just before. ``ratio``:
of the largest RAM to the smallest; aimed at: 1.3 at most. Nothing here fails a build.
"""

from __future__ import annotations

import argparse
import json
import statistics
import tempfile
import time
from pathlib import Path
from typing import Any

import msgspec

from bench.host import host_facts, numbers
from guests.qemu import GuestVm
from guests.serial import Tick
from stillframe import api
from stillframe.model import TARGET_PAGE_BYTES

_WRITTEN_MIB = 32
_LEAST_BETWEEN_S = 0.5
MIB = 1 << 20


class WatchFigures(msgspec.Struct, frozen=True, kw_only=True):
    """Medians over the tracked snapshots of one VM; ``first_ms``: the first, whole one."""

    ram_mib: int
    populated_mib: int
    snapshots: int
    first_ms: float
    total_ms: float
    arm_ms: float
    downtime_ms: float
    read_mib: float
    written_mib: float
    armed_guest_share: float


class _Snapshots(api.Follower):
    """A follower that records each snapshot and when it ended."""

    def __init__(self) -> None:
        self.taken_at: list[tuple[api.TakenSnapshot, bool, float]] = []

    def taken(self, snapshot: api.TakenSnapshot, *, tracked: bool) -> None:
        self.taken_at.append((snapshot, tracked, time.monotonic()))


def _pages_per_s(ticks: list[Tick], begin_s: float, end_s: float) -> float:
    inside = [tick for tick in ticks if begin_s <= tick.received_s <= end_s]
    span_s = inside[-1].received_s - inside[0].received_s
    return (inside[-1].pages - inside[0].pages) / span_s


def _between(ticks: list[Tick], seen: _Snapshots) -> float:
    """Return the guest's median write rate, pages/s, between the end of one snapshot and the start
    of the next. Before the first snapshot RAM was not tracked, so that time does not count."""
    rates = []
    for (_, _, end_s), (following, _, next_end_s) in zip(
        seen.taken_at, seen.taken_at[1:], strict=False
    ):
        begin_s = next_end_s - following.statistics.total_ms / 1e3
        if begin_s - end_s > _LEAST_BETWEEN_S:
            rates.append(_pages_per_s(ticks, end_s, begin_s))
    return statistics.median(rates)


def measure(ram_mib: int, options: argparse.Namespace) -> WatchFigures:
    """Watch one VM, and return its figures."""
    populate_mib = int(ram_mib * options.populate) - _WRITTEN_MIB
    vm = GuestVm(
        options.guest,
        ram_mib=ram_mib,
        mem_mib=_WRITTEN_MIB,
        populate_mib=populate_mib,
        rate_mib_per_s=options.rate,
        tick_ms=50,
        name=f"bench-watch-{ram_mib}",
    )
    with (
        tempfile.TemporaryDirectory(prefix="bench-watch-", dir="/var/tmp") as place,
        vm.start(timeout_s=300),
    ):
        store = api.init(Path(place) / "store")
        mark = vm.console.mark()
        began_s = time.monotonic()
        time.sleep(options.every * 2)
        free = _pages_per_s(vm.ticks(mark), began_s, time.monotonic())
        seen = _Snapshots()
        mark = vm.console.mark()
        api.watch(
            str(vm.qmp_path),
            every_s=options.every,
            count=options.count + 1,
            store=store,
            follower=seen,
        )
        share = _between(vm.ticks(mark), seen) / free
    tracked = [taken.statistics for taken, by_tracking, _ in seen.taken_at if by_tracking]

    def median(of: Any) -> float:
        return round(statistics.median(of(one) for one in tracked), 3)

    return WatchFigures(
        ram_mib=ram_mib,
        populated_mib=populate_mib + _WRITTEN_MIB,
        snapshots=len(tracked),
        first_ms=round(seen.taken_at[0][0].statistics.total_ms, 1),
        total_ms=median(lambda one: one.total_ms),
        arm_ms=median(lambda one: one.arm_ms),
        downtime_ms=median(lambda one: one.downtime_ms),
        read_mib=median(lambda one: (one.pages.data + one.pages.zero) * TARGET_PAGE_BYTES / MIB),
        written_mib=median(lambda one: one.file_bytes / MIB),
        armed_guest_share=round(share, 4),
    )


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("--ram", type=numbers, default=[1024, 4096])
    parser.add_argument("--populate", type=float, default=0.5)
    parser.add_argument("--rate", type=int, default=20)
    parser.add_argument("--every", type=float, default=5.0)
    parser.add_argument("--count", type=int, default=5)
    parser.add_argument("--guest", choices=["linux", "multiboot"], default="linux")
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    found = []
    for ram_mib in options.ram:
        found.append(measure(ram_mib, options))
        print(json.dumps(msgspec.to_builtins(found[-1])), flush=True)
    least, most = found[0], found[-1]
    ratios = {
        name: round(getattr(most, name) / getattr(least, name), 2)
        for name in ("total_ms", "read_mib", "written_mib", "downtime_ms")
    }
    print(f"ratio {most.ram_mib} to {least.ram_mib} MiB: {json.dumps(ratios)}")
    if options.json is not None:
        report = {
            "host": host_facts(),
            "figures": [msgspec.to_builtins(one) for one in found],
            "ratios": ratios,
        }
        options.json.write_text(json.dumps(report, indent=2) + "\n")


if __name__ == "__main__":
    main()
