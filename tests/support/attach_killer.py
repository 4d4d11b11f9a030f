"""Attach to a process in a loop and die by kill -9 at a random moment, many times over.

Run as ``python -m tests.support.attach_killer PID TIMES SEED MOST_US``.
"""

from __future__ import annotations

import os
import random
import signal
import sys
import time

from stillframe.kernel.remote_attach import attach


def _one_death(pid: int, delay_s: float) -> None:
    reader, writer = os.pipe()
    child = os.fork()
    if child == 0:
        os.write(writer, b"r")
        while True:
            attach(pid).close()
    os.read(reader, 1)
    end = time.perf_counter() + delay_s
    while time.perf_counter() < end:
        pass
    os.kill(child, signal.SIGKILL)
    os.waitpid(child, 0)
    os.close(reader)
    os.close(writer)


def main() -> None:
    pid, times, seed, most_us = map(int, sys.argv[1:])
    chance = random.Random(seed)
    # Once to the end, so that every module is loaded before the first fork.
    attach(pid).close()
    for _ in range(times):
        _one_death(pid, chance.random() * most_us / 1e6)


if __name__ == "__main__":
    main()
