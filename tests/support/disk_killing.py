"""`kill -9` of a take with disks of a plain QEMU."""

from __future__ import annotations

import os
import random
import signal
import subprocess
import time
from pathlib import Path

from guests.qemu import GuestVm
from guests.serial import parse_tick
from stillframe import api
from stillframe.snapshot.faultpoints import POINTS
from tests.support.journal_vm import assert_writes_on, nodes_of_ours, take_with_disks, torn
from tests.support.taking import finish, start_take


def kill_takes(vm: GuestVm, disks: list[Path], directory: Path, kind: str, kills: int) -> float:
    """Kill takes, at fault points and at random moments; each time the guest writes on, the next
    take works and is of one instant, and in the end nothing of ours is left.

    Args:
        directory: with the disks, and nothing else.

    Returns:
        The longest time from a take's death to the guest's next tick, seconds.
    """
    longest_s = 0.0
    out = directory / "out"
    out.mkdir()
    chance = random.Random(7)
    points = [point for point in POINTS if point not in ("locked", "guarded")]
    for number in range(kills):
        fault = "" if number % 2 else f"{points[number * 5 % len(points)]}=kill"
        process = start_take(
            vm, out / "killed.still", "--disks", kind, "--max-drain", "5000", fault=fault
        )
        if not fault:
            try:
                process.wait(chance.uniform(0.3, 2.5))
            except subprocess.TimeoutExpired:
                os.kill(process.pid, signal.SIGKILL)
        finish(process)
        dead_s, mark = time.monotonic(), vm.console.mark()
        assert vm.is_progressing(), f"the guest does not go on after kill {number}"
        ticks = (at for at, text in vm.console.timed_lines(mark) if parse_tick(text))
        longest_s = max(longest_s, next(ticks) - dead_s)
        assert_writes_on(vm)
        if kind == "copy":
            deadline = time.monotonic() + 60
            while nodes_of_ours(vm):
                assert time.monotonic() < deadline, f"left after {fault}: {nodes_of_ours(vm)}"
                time.sleep(0.1)
        for path in sorted(out.rglob("*"), reverse=True):  # a take that was fast enough
            path.unlink() if path.is_file() else path.rmdir()
        file = directory / "next.still"
        take_with_disks(vm, file, kind)
        assert torn(file, directory) == []
        file.unlink()
    api.commit(str(vm.qmp_path))
    assert nodes_of_ours(vm) == []
    assert {p.name for p in directory.iterdir() if p.is_file()} == {disk.name for disk in disks}
    assert_writes_on(vm)
    return longest_s
