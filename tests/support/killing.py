"""`kill -9` of a snapshotter at random moments."""

from __future__ import annotations

import os
import random
import signal
import subprocess
import time
from collections import Counter
from collections.abc import Callable
from pathlib import Path

from stillframe.store.snapshot import Snapshot
from tests.support.taking import TakenFrom, finish, start_take


def kill_at_random_moments(
    vm: TakenFrom,
    directory: Path,
    unharmed: Callable[[], object],
    *,
    times: int,
    seed: int,
    check_every: int = 1,
) -> Counter[str]:
    """Start a snapshot, kill it at a random moment, and see that the guest is unharmed.

    Moments are spread over the time that a whole snapshot takes here. Every kill is followed by
    a look at the guest; every ``check_every``-th also by ``unharmed``, such as a whole snapshot.

    Returns:
        How often it was ``killed`` (of these: ``named``, with a complete file), and how often it
        had ``finished`` before.
    """
    chance = random.Random(seed)
    began = time.monotonic()
    process = start_take(vm, directory / "whole.still")
    assert finish(process)[0] == 0
    whole_s = time.monotonic() - began
    (directory / "whole.still").unlink()
    outcomes: Counter[str] = Counter()
    for number in range(times):
        file = directory / "killed.still"
        began = time.monotonic()
        process = start_take(vm, file)
        try:
            process.wait(chance.uniform(0.1, 1.1) * whole_s)
            whole_s = min(whole_s, time.monotonic() - began)
        except subprocess.TimeoutExpired:
            os.kill(process.pid, signal.SIGKILL)
        code, _, complaints = finish(process)
        if code == 0:
            outcomes["finished"] += 1
            file.unlink()
        else:
            assert code == -signal.SIGKILL, complaints
            outcomes["killed"] += 1
            if file.exists():
                # Killed between naming it and ending: then it is complete.
                with Snapshot.open(file) as snapshot:
                    snapshot.verify()
                file.unlink()
                outcomes["named"] += 1
        assert vm.is_progressing(1.0), f"the guest does not go on after kill {number}"
        assert os.listdir(directory) == [], "something was left behind"
        if number % check_every == 0:
            unharmed()
    return outcomes
