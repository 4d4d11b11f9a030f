"""`kill -9` of a snapshotter at random moments."""

from __future__ import annotations

import os
import random
import shutil
import signal
import subprocess
import time
from collections import Counter
from collections.abc import Callable
from pathlib import Path

from stillframe.store import open_snapshot
from tests.support.taking import TakenFrom, finish, start_take


def kill_at_random_moments(
    vm: TakenFrom,
    directory: Path,
    unharmed: Callable[[], object],
    *,
    times: int,
    seed: int,
    check_every: int = 1,
    words: tuple[str, ...] = (),
) -> Counter[str]:
    """Start a snapshot, kill it at a random moment, and see that the guest is unharmed.

    ``words``: for ``take``.

    Moments are spread over the time that a whole snapshot takes here. Every kill is followed by
    a look at the guest; every ``check_every``-th also by ``unharmed``, such as a whole snapshot.

    Returns:
        How often it was ``killed`` (of these: ``named``, with a complete file), and how often it
        had ``finished`` before.
    """
    chance = random.Random(seed)
    began = time.monotonic()
    process = start_take(vm, directory / "whole.still", *words)
    assert finish(process)[0] == 0
    whole_s = time.monotonic() - began
    _remove(directory / "whole.still")
    outcomes: Counter[str] = Counter()
    for number in range(times):
        file = directory / "killed.still"
        began = time.monotonic()
        process = start_take(vm, file, *words)
        try:
            process.wait(chance.uniform(0.1, 1.1) * whole_s)
            whole_s = min(whole_s, time.monotonic() - began)
        except subprocess.TimeoutExpired:
            os.kill(process.pid, signal.SIGKILL)
        code, _, complaints = finish(process)
        if code == 0:
            outcomes["finished"] += 1
            _remove(file)
        else:
            assert code == -signal.SIGKILL, complaints
            outcomes["killed"] += 1
            if file.exists():
                # Killed between naming it and ending: then it is complete.
                with open_snapshot(file) as snapshot:
                    snapshot.verify()
                outcomes["named"] += 1
            _remove(file)  # copies get their names before the snapshot
        assert vm.is_progressing(), f"the guest does not go on after kill {number}"
        assert os.listdir(directory) == [], "something was left behind"
        if number % check_every == 0:
            unharmed()
    return outcomes


def _remove(file: Path) -> None:
    """A snapshot and the copies of its disks."""
    file.unlink(missing_ok=True)
    shutil.rmtree(f"{file}.disks", ignore_errors=True)
