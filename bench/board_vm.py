"""A board with the writer guest, in its own process as users run it, and its observation."""

from __future__ import annotations

import os
import re
import signal
import subprocess
import sys
import time
from contextlib import ExitStack
from pathlib import Path

import msgspec

from bench.cpu_wait import CpuWait
from bench.guest_view import pages_per_s, ticks_about
from bench.observer import Observer
from guests.serial import SerialConsole
from stillframe.errors import MachineError

_TICK_MS = 20
_START_S = 20.0
_PREPARE_S = 300.0
_TICK_WAIT_S = 30.0
_FIELD = re.compile(r"(\w+)=(\d+)")


class BoardTick(msgspec.Struct, frozen=True):
    """A tick line of the writer (docs/reference/board-guests.md). ``received_s``: our clock."""

    received_s: float
    pages: int
    gap_us: int


class View(msgspec.Struct, frozen=True, kw_only=True):
    """The guest over a stretch of time: its write rate and its longest gap; ``cpu_wait``: the share
    of the time in which its vCPU was runnable but had no CPU."""

    pages_per_s: float
    gap_max_ms: float
    cpu_wait: float


class BoardVm:
    """One running board, a context manager; the guest waits for ``go_on``.

    Args:
        directory: for its sockets.
        protection: as ``stillframe board run --protection``.
        rate_mib_per_s: the guest's write rate; 0 is full speed.
        whole: write every word of a page, so that RAM does not compress.
    """

    def __init__(
        self, directory: Path, *, protection: str, ram_mib: int, rate_mib_per_s: int, whole: bool
    ) -> None:
        """Start the board, and wait until the guest has populated its RAM.

        Raises:
            MachineError: it does not start.
        """
        self.qmp_path = directory / "qmp"
        serial = directory / "serial"
        options = f"rate={rate_mib_per_s} tick_ms={_TICK_MS}" + (" whole=1" if whole else "")
        self._cleanup = ExitStack()
        command = [sys.executable, "-m", "stillframe", "board", "run", "writer", "--paused"]
        command += ["--ram", f"{ram_mib}M", "--append", options, "--protection", protection]
        command += ["--serial", f"unix:{serial}", "--qmp", str(self.qmp_path)]
        self._process = subprocess.Popen(
            command, stdin=subprocess.DEVNULL, stderr=subprocess.DEVNULL
        )
        self._cleanup.callback(self._end)
        try:
            self.console = SerialConsole(serial, timeout_s=_START_S)
            self._cleanup.callback(self.console.close)
            self.observer = self._observer()
            self._cleanup.callback(self.observer.close)
            self.observer.execute(
                "migrate-set-capabilities",
                {"capabilities": [{"capability": "events", "state": True}]},
            )
            threads = [cpu["thread-id"] for cpu in self.observer.execute("query-cpus-fast")]
            self._cpu_wait = CpuWait(self.pid, threads)
            self._cleanup.callback(self._cpu_wait.close)
            self.go_on()
            ready = self.console.wait_line("^writer ready", timeout_s=_PREPARE_S)
            self.populated_pages = _fields(ready)["pages"]
        except BaseException:
            self.close()
            raise

    def _observer(self) -> Observer:
        deadline = time.monotonic() + _START_S
        while True:
            try:
                return Observer(self.qmp_path)
            except MachineError:
                if time.monotonic() > deadline:
                    raise
                time.sleep(0.02)

    @property
    def pid(self) -> int:
        return self._process.pid

    def stop(self) -> None:
        """Stop the guest."""
        self.observer.execute("stop")

    def go_on(self) -> None:
        """Let the guest go on."""
        self.observer.execute("cont")

    def audit(self) -> str:
        """Return the guest's own report on its RAM."""
        since = self.console.mark()
        self.console.send("a")
        return self.console.wait_line("^AUDIT ", timeout_s=_PREPARE_S, since=since)

    def _ticks(self, since: int) -> list[BoardTick]:
        return [
            BoardTick(at, fields["pages"], fields["gap_us"])
            for at, line in self.console.timed_lines(since)
            if line.startswith("tick ") and {"pages", "gap_us"} <= (fields := _fields(line)).keys()
        ]

    def wait_tick(self) -> None:
        """Wait until the guest prints a tick.

        Raises:
            MachineError: it does not.
        """
        since = self.console.mark()
        self.console.wait_line(r"^tick .*gap_us=\d+$", timeout_s=_TICK_WAIT_S, since=since)

    def view(self, since: int, from_s: float, to_s: float) -> View:
        """Summarize the time between two moments of our monotonic clock.

        Args:
            since: a mark of the console from at least one tick earlier.

        Raises:
            MachineError: the guest printed no ticks around them.
        """
        ticks = self._ticks(since)
        return View(
            pages_per_s=pages_per_s(ticks, from_s, to_s),
            gap_max_ms=max(tick.gap_us for tick in ticks_about(ticks, from_s, to_s)) / 1e3,
            cpu_wait=self._cpu_wait.share(from_s, to_s),
        )

    def alone(self, seconds: float) -> View:
        """Observe the undisturbed guest for some seconds."""
        since = self.console.mark()
        self.wait_tick()
        began_s = time.monotonic()
        time.sleep(seconds)
        ended_s = time.monotonic()
        self.wait_tick()
        self.wait_tick()
        return self.view(since, began_s, ended_s)

    def _end(self) -> None:
        os.kill(self._process.pid, signal.SIGKILL)
        self._process.wait()

    def close(self) -> None:
        """End the board."""
        self._cleanup.close()

    def __enter__(self) -> BoardVm:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


def _fields(line: str) -> dict[str, int]:
    return {name: int(value) for name, value in _FIELD.findall(line)}
