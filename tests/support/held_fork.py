"""A fork whose sweep waits for the word: what the clones have then, they have by asking for it.

As a program, ``held_fork.py PID COUNT [DISKS]``: forks, prints the clones as JSON once they run,
and sweeps when its standard input ends.
"""

from __future__ import annotations

import queue
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import msgspec
import pytest

from stillframe import api
from stillframe.restore.restored import RestoredVm
from stillframe.snapshot.encoders import Encoders

RUN_S = 120.0


class HeldFork(threading.Thread):
    """``vms`` run, and nothing was swept yet; until ``go_on``. For ``with``."""

    def __init__(self, vm: int, count: int, **options: Any) -> None:
        super().__init__(daemon=True)
        self._arguments, self._options = (vm, count), options
        self._gate = threading.Event()
        self._seen: queue.Queue[list[RestoredVm]] = queue.Queue()
        self.failure: BaseException | None = None
        self.done: list[RestoredVm] = []
        self.vms: list[RestoredVm] = []

    def __enter__(self) -> HeldFork:
        self._patch = pytest.MonkeyPatch()
        drain = Encoders.drain

        def later(encoders: Encoders, *arguments: Any) -> None:
            self._gate.wait(RUN_S)
            drain(encoders, *arguments)

        self._patch.setattr(Encoders, "drain", later)
        self.start()
        try:
            self.vms = self._seen.get(timeout=RUN_S)
        except queue.Empty:
            self.go_on()
            raise AssertionError(f"no clone runs: {self.failure!r}") from self.failure
        return self

    def run(self) -> None:
        try:
            self.done = api.fork(*self._arguments, on_running=self._seen.put, **self._options)
        except BaseException as error:  # noqa: BLE001 - for the test to look at
            self.failure = error

    def go_on(self) -> None:
        """Sweep, to the end of the fork."""
        self._gate.set()
        self.join(RUN_S)
        assert not self.is_alive()

    def __exit__(self, *_error: object) -> None:
        self.go_on()
        self._patch.undo()


@contextmanager
def held_fork(vm: int, count: int, **options: Any) -> Iterator[HeldFork]:
    """For ``with``; raises what made the fork fail."""
    with HeldFork(vm, count, **options) as fork:
        yield fork
    if fork.failure is not None:
        raise fork.failure


if __name__ == "__main__":
    options: dict[str, Any] = {"disks": sys.argv[3]} if len(sys.argv) > 3 else {}
    with held_fork(int(sys.argv[1]), int(sys.argv[2]), max_drain_ms=60_000.0, **options) as found:
        print(msgspec.json.encode(found.vms).decode(), flush=True)
        sys.stdin.read()
