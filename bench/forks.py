"""How long until N clones of a running VM run, and what that costs it: beside QEMU's bare start of
N, and beside a snapshot of it; all in one run.

Run as ``python -m bench.forks``. It records: its exit code does not depend on any figure.
"""

from __future__ import annotations

import statistics
import subprocess
import sys
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import msgspec

from bench.guest_view import pages_per_s
from bench.host import numbers
from bench.restore import wait_running
from bench.sizes import show, sizes_parser
from bench.table import grid
from guests.qemu import GuestVm, qemu_binary
from guests.serial import SerialConsole
from stillframe import api
from stillframe.machine.finding import connect
from stillframe.model import Statistics
from stillframe.restore.clones import CloneOptions
from stillframe.restore.fork_running import plan_live
from stillframe.restore.restored import RestoredVm
from stillframe.snapshot.job import SnapshotJob
from stillframe.snapshot.options import SnapshotOptions
from stillframe.snapshot.output import NoOutput
from stillframe.snapshot.take import take_into

_TIMEOUT_S = 300.0
_ALONE_S = 2.0


class Forked(msgspec.Struct, frozen=True, kw_only=True):
    """The figures of one method; None: no figure.

    Milliseconds from the command on: ``running_ms``: until all clones run; ``tick_ms``: until all
    have printed a line; ``resident_ms``: until all of RAM is resident. The source: ``downtime_ms``;
    ``fault_max_ms``: its longest wait for a write; ``gap_ms``: its longest gap, as it saw itself;
    ``progress``: its write rate meanwhile, relative to the undisturbed rate. The most of any one
    clone, when all run: ``private_mib``, ``shared_mib``."""

    running_ms: float | None = None
    tick_ms: float | None = None
    resident_ms: float | None = None
    downtime_ms: float | None = None
    fault_max_ms: float | None = None
    gap_ms: float | None = None
    progress: float | None = None
    private_mib: float | None = None
    shared_mib: float | None = None


def bare(vm: GuestVm, count: int) -> Forked:
    """Start N QEMUs with the clones' command lines, without any incoming state."""
    with connect(str(vm.qmp_path)) as machine:
        _, plans = plan_live(machine, CloneOptions(count=count))
    assert plans
    processes = []
    mark, alone = vm.console.mark(), _alone(vm)
    began_s = time.monotonic()
    try:
        for plan in plans:
            Path(plan.directory).mkdir(parents=True)
            processes.append(
                subprocess.Popen(
                    plan.argv, cwd=plan.cwd, stdin=subprocess.DEVNULL, start_new_session=True
                )
            )
        running_s = max(wait_running(plan.qmp_address) for plan in plans)
    finally:
        for process in processes:
            process.kill()
            process.wait()
        for plan in plans:
            for path in Path(plan.directory).iterdir():
                path.unlink()
            Path(plan.directory).rmdir()
    found = Forked(running_ms=(running_s - began_s) * 1000)
    return _of_source(vm, mark, found, alone, (began_s, running_s))


def snapshot(vm: GuestVm, _count: int) -> Forked:
    """Measure what a snapshot without any clone costs the source."""
    mark, alone = vm.console.mark(), _alone(vm)
    began_s = time.monotonic()
    with connect(str(vm.qmp_path)) as machine:
        taken = SnapshotJob(lambda c: take_into(c, machine, NoOutput(), SnapshotOptions())).wait(
            _TIMEOUT_S
        )
    span = began_s, time.monotonic()
    return _of_source(vm, mark, _costs(taken.statistics, Forked()), alone, span)


def fork(vm: GuestVm, count: int) -> Forked:
    """Fork N clones."""
    seen: list[Statistics] = []
    memory: list[tuple[float, float]] = []
    ticks: list[float] = []
    watcher: list[threading.Thread] = []

    def on_running(vms: list[RestoredVm]) -> None:
        memory.extend(_memory(one.pid) for one in vms)
        watcher.append(threading.Thread(target=lambda: ticks.append(_all_ticked(vms))))
        watcher[0].start()

    mark, alone = vm.console.mark(), _alone(vm)
    began_s = time.monotonic()
    vms = api.fork(vm.pid, count, on_running=on_running, on_progress=seen.append)
    span = began_s, time.monotonic()
    try:
        watcher[0].join()
        assert all(one.image_path for one in vms), vms[0].notes
        found = Forked(
            running_ms=max(one.first_instruction_ms or 0 for one in vms),
            tick_ms=(ticks[0] - began_s) * 1000,
            resident_ms=max(one.resident_ms or 0 for one in vms),
            private_mib=max(private for private, _ in memory),
            shared_mib=max(shared for _, shared in memory),
        )
        return _of_source(vm, mark, _costs(seen[-1], found), alone, span)
    finally:
        for one in vms:
            one.kill()


def _alone(vm: GuestVm) -> float:
    """Return the pages that the undisturbed guest writes per second."""
    first = vm.wait_tick().received_s
    mark = vm.console.mark()
    while vm.wait_tick().received_s < first + _ALONE_S:
        pass
    ticks = vm.ticks(mark)
    return pages_per_s(ticks, ticks[1].received_s, ticks[-2].received_s)


def _costs(seen: Statistics, found: Forked) -> Forked:
    return msgspec.structs.replace(
        found, downtime_ms=seen.downtime_ms, fault_max_ms=seen.fault_max_us / 1000
    )


def _of_source(
    vm: GuestVm, mark: int, found: Forked, alone: float, span: tuple[float, float]
) -> Forked:
    while vm.wait_tick().received_s < span[1]:
        pass
    ticks = vm.ticks(mark)
    about = [tick for tick in ticks if tick.received_s >= span[0]]
    return msgspec.structs.replace(
        found,
        gap_ms=max(tick.gap_us for tick in about) / 1000,
        progress=pages_per_s(ticks, *span) / alone,
    )


def _all_ticked(vms: list[RestoredVm]) -> float:
    def first(vm: RestoredVm) -> float:
        console = SerialConsole(next(Path(path) for path in vm.sockets if "serial" in path))
        try:
            console.wait_tick(_TIMEOUT_S)
            return time.monotonic()
        finally:
            console.close()

    with ThreadPoolExecutor(len(vms)) as pool:
        return max(pool.map(first, vms))


def _memory(pid: int) -> tuple[float, float]:
    """Return a process's private and shared memory, MiB (proc_pid_smaps(5))."""
    sizes: dict[str, int] = {}
    for line in Path(f"/proc/{pid}/smaps_rollup").read_text().splitlines()[1:]:
        name, size = line.split()[:2]
        sizes[name] = int(size)
    private = sizes["Private_Clean:"] + sizes["Private_Dirty:"]
    return private / 1024, (sizes["Rss:"] - private) / 1024


_METHODS = {"bare start": bare, "snapshot": snapshot, "fork": fork}


def run(ram_mib: int, count: int, repeat: int, program: str) -> dict[str, Any]:
    """Run all methods in turns, so that other load on the host affects all alike."""
    populate = (ram_mib - 128) * 3 // 4
    runs: dict[str, list[Forked]] = {name: [] for name in _METHODS}
    with GuestVm(
        "linux", ram_mib=ram_mib, populate_mib=populate, name="forked", binary=program
    ).start(timeout_s=_TIMEOUT_S) as vm:
        for _ in range(repeat):
            for name, method in _METHODS.items():
                runs[name].append(method(vm, count))
                print(f"{count} of {ram_mib} MiB, {name}: {runs[name][-1]}", file=sys.stderr)
    medians = {name: _medians(found) for name, found in runs.items()}
    forked, base = medians["fork"], medians["bare start"]["running_ms"]
    return {
        "ram_mib": ram_mib,
        "data_mib": populate,
        "clones": count,
        "runs": msgspec.to_builtins(runs),
        "medians": medians,
        "ratios": {
            "running_over_bare": forked["running_ms"] / base,
            "running_minus_bare_ms": forked["running_ms"] - base,
            "private_of_ram": forked["private_mib"] / ram_mib,
            "downtime_over_snapshot": forked["downtime_ms"] / medians["snapshot"]["downtime_ms"],
        },
    }


def _medians(runs: list[Forked]) -> dict[str, Any]:
    found = {}
    for name in Forked.__struct_fields__:
        values = [value for one in runs if (value := getattr(one, name)) is not None]
        found[name] = statistics.median(values) if values else None
    return found


def _table(result: dict[str, Any]) -> str:
    names = Forked.__struct_fields__
    rows = [["", *(name.replace("_ms", ", ms").replace("_mib", ", MiB") for name in names)]]
    for method, values in result["medians"].items():
        cells = ["-" if values[name] is None else f"{values[name]:.2f}" for name in names]
        rows.append([method, *cells])
    head = f"{result['clones']} clones, {result['ram_mib']} MiB of RAM (medians)"
    ratios = ", ".join(f"{name} {value:.2f}" for name, value in result["ratios"].items())
    return "\n".join([head, *grid(rows), ratios])


def main(arguments: list[str] | None = None) -> int:
    """Run the benchmark; the exit code depends on no figure."""
    parser = sizes_parser("forks", __doc__)
    parser.add_argument("--clones", type=numbers, default=[1, 8], help="a list with commas")
    options = parser.parse_args(arguments)
    program = options.qemu or qemu_binary()
    results = [
        run(ram_mib, count, options.repeat, program)
        for ram_mib in options.ram
        for count in options.clones
    ]
    show(results, _table, options.json)
    return 0


if __name__ == "__main__":
    sys.exit(main())
