"""The compared ways to save a running board. Each saves into one new file, synced."""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import msgspec

from bench.board_vm import BoardVm
from bench.observer import stopped_ms
from bench.processes import reset_peak, run_program, status_bytes, written_bytes
from stillframe.errors import MachineError

TIMEOUT_S = 600.0
_ENDS = ("completed", "failed", "cancelled")


class BoardSaved(msgspec.Struct, frozen=True, kw_only=True):
    """One save. Moments are on our monotonic clock.

    ``began_s``: the command was given; ``touched_s``: its first possible effect on the guest;
    ``durable_s``: the file is synced under its name, and the command has ended.
    ``downtime_ms``: between the STOP and RESUME events. ``grew_bytes``: the greatest growth of the
    board's process; ``peak_bytes``: that plus the peak of other processes of ours.
    ``own``: the snapshot's own statistics; empty with stop-and-save.
    """

    began_s: float
    touched_s: float
    durable_s: float
    downtime_ms: float | None
    file_bytes: int
    written_bytes: int
    grew_bytes: int
    peak_bytes: int
    own: Mapping[str, Any]


Method = Callable[[BoardVm, Path], BoardSaved]


def inside(vm: BoardVm, out: Path) -> BoardSaved:
    """Save with the board's capability ``background-snapshot``, into a file."""
    _background(vm, on=True)
    try:
        with _account(vm, out) as saved:
            _migrate(vm, out)
    finally:
        _background(vm, on=False)
    return saved[0]


def stop_and_save(vm: BoardVm, out: Path) -> BoardSaved:
    """Stop the board, migrate it into a file without a bandwidth limit, and resume it."""
    vm.observer.execute("migrate-set-parameters", {"max-bandwidth": 0})
    with _account(vm, out, has_statistics=False) as saved:
        vm.stop()
        try:
            _migrate(vm, out)
        finally:
            vm.go_on()
    return saved[0]


def take(arguments: Sequence[str]) -> Method:
    """Save with ``stillframe take`` as its own process, as users run it: its times include the
    start of Python."""

    def save(vm: BoardVm, out: Path) -> BoardSaved:
        events = vm.observer.mark()
        reset_peak(vm.pid)
        resident = status_bytes(vm.pid, "VmRSS")
        command = [sys.executable, "-m", "stillframe", "take", str(vm.qmp_path)]
        command += ["-o", str(out), "--json", *arguments]
        done = run_program(command, timeout_s=TIMEOUT_S)
        own: dict[str, Any] = json.loads(done.output)
        stop = vm.observer.wait_event("STOP", events, 5)
        vm.observer.wait_event("RESUME", events, 5)
        grew = max(0, status_bytes(vm.pid, "VmHWM") - resident)
        return BoardSaved(
            began_s=done.started_s,
            touched_s=stop.received_s - float(own["arm_ms"]) / 1e3,
            durable_s=done.ended_s,
            downtime_ms=stopped_ms(vm.observer.events(events)),
            file_bytes=out.stat().st_size,
            written_bytes=done.written_bytes,
            grew_bytes=grew,
            peak_bytes=done.peak_bytes + grew,
            own=own,
        )

    return save


def _background(vm: BoardVm, *, on: bool) -> None:
    capability = {"capability": "background-snapshot", "state": on}
    vm.observer.execute("migrate-set-capabilities", {"capabilities": [capability]})


def _migrate(vm: BoardVm, out: Path) -> None:
    """Migrate into a file, which the board syncs before it reports completion."""
    events = vm.observer.mark()
    vm.observer.execute("migrate", {"uri": f"file:{out}"})
    # Wait for the event instead of polling, which would take CPU time in the downtime.
    end = vm.observer.wait_event("MIGRATION", events, TIMEOUT_S, status=_ENDS)
    if end.data["status"] != "completed":
        numbers = vm.observer.execute("query-migrate")
        raise MachineError("the board's migration failed", why=numbers.get("error-desc"))


@contextmanager
def _account(vm: BoardVm, out: Path, *, has_statistics: bool = True) -> Iterator[list[BoardSaved]]:
    """Measure the board's part of a save; the list gets its one item at the end."""
    events = vm.observer.mark()
    reset_peak(vm.pid)
    resident, written = status_bytes(vm.pid, "VmRSS"), written_bytes(vm.pid)
    result: list[BoardSaved] = []
    began_s = time.monotonic()
    yield result
    durable_s = time.monotonic()
    vm.observer.wait_event("RESUME", events, 5)
    grew = max(0, status_bytes(vm.pid, "VmHWM") - resident)
    own = vm.observer.execute("query-migrate")["x-stillframe"] if has_statistics else {}
    result.append(
        BoardSaved(
            began_s=began_s,
            touched_s=began_s,
            durable_s=durable_s,
            downtime_ms=stopped_ms(vm.observer.events(events)),
            file_bytes=out.stat().st_size,
            written_bytes=written_bytes(vm.pid) - written,
            grew_bytes=grew,
            peak_bytes=grew,
            own=own,
        )
    )
