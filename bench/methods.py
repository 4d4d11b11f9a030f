"""The compared ways to save a running VM. Each saves into one new file, synced."""

from __future__ import annotations

import json
import os
import shlex
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import msgspec

from bench.cpu_wait import CpuWait
from bench.observer import Observer, stopped_ms
from bench.processes import (
    PeakSampler,
    reset_peak,
    run_program,
    status_bytes,
    written_bytes,
)
from guests.qemu import GuestVm
from stillframe.errors import MachineError

TIMEOUT_S = 600.0
_POLL_S = 0.02
_NO_LIMIT = 1 << 40


class Saved(msgspec.Struct, frozen=True, kw_only=True):
    """One save. Moments are on our monotonic clock.

    ``began_s``: the command was given; ``touched_s``: its first possible effect on the guest;
    ``durable_s``: the file is synced under its name, and the command has ended.
    ``downtime_ms``: between QEMU's STOP and RESUME events. ``own``: the method's own numbers.
    ``peak_bytes``: peak memory of our processes; with QEMU's methods, the greatest growth of QEMU's
    resident memory plus its children's peak. ``cpu_s``: CPU time of our processes; None with QEMU's
    methods, whose work cannot be told apart from the guest's.
    """

    began_s: float
    touched_s: float
    durable_s: float
    downtime_ms: float | None
    file_bytes: int
    written_bytes: int
    peak_bytes: int
    vmm_grew_bytes: int
    cpu_s: float | None
    own: dict[str, Any]


class Subject(msgspec.Struct, frozen=True):
    """The VM to save, the benchmark's own connection to its monitor, and its vCPUs' run delay."""

    vm: GuestVm
    observer: Observer
    cpu_wait: CpuWait


Method = Callable[[Subject, Path], Saved]


def take(program: Sequence[str], arguments: Sequence[str]) -> Method:
    """Save with Stillframe as its own process, as users run it: its times include the start of
    Python."""

    def save(subject: Subject, out: Path) -> Saved:
        vm, observer = subject.vm, subject.observer
        events = observer.mark()
        reset_peak(vm.pid)
        resident = status_bytes(vm.pid, "VmRSS")
        command = [*program, str(vm.qmp_path), "-o", str(out), "--json", *arguments]
        done = run_program(command, timeout_s=TIMEOUT_S)
        own: dict[str, Any] = json.loads(done.output)
        stop = observer.wait_event("STOP", events, 5)
        observer.wait_event("RESUME", events, 5)
        return Saved(
            began_s=done.started_s,
            touched_s=stop.received_s - float(own["arm_ms"]) / 1e3,
            durable_s=done.ended_s,
            downtime_ms=stopped_ms(observer.events(events)),
            file_bytes=out.stat().st_size,
            written_bytes=done.written_bytes,
            peak_bytes=done.peak_bytes,
            vmm_grew_bytes=status_bytes(vm.pid, "VmHWM") - resident,
            cpu_s=done.cpu_s,
            own=own,
        )

    return save


def qemu_background(writer: str) -> Method:
    """Save with QEMU's own ``background-snapshot``.

    Args:
        writer: the program that takes the stream, in shell words (``cat``, ``zstd -1``).
    """

    def save(subject: Subject, out: Path) -> Saved:
        capability = {"capability": "background-snapshot", "state": True}
        observer = subject.observer
        observer.execute("migrate-set-capabilities", {"capabilities": [capability]})
        try:
            with _account(subject, out) as account:
                _migrate(observer, writer, out)
        finally:
            capability["state"] = False
            observer.execute("migrate-set-capabilities", {"capabilities": [capability]})
        return account[0]

    return save


def stop_and_save(writer: str) -> Method:
    """Stop the VM, migrate it into a file, and resume it."""

    def save(subject: Subject, out: Path) -> Saved:
        observer = subject.observer
        observer.execute("migrate-set-parameters", {"max-bandwidth": _NO_LIMIT})
        with _account(subject, out) as account:
            observer.execute("stop")
            try:
                _migrate(observer, writer, out)
            finally:
                observer.execute("cont")  # also reactivates the disks
        return account[0]

    return save


@contextmanager
def _account(subject: Subject, out: Path) -> Iterator[list[Saved]]:
    """Measure QEMU's part of a save; the list gets its one item at the end."""
    pid, observer = subject.vm.pid, subject.observer
    events = observer.mark()
    reset_peak(pid)
    resident, written = status_bytes(pid, "VmRSS"), written_bytes(pid)
    result: list[Saved] = []
    began_s = time.monotonic()
    sampler = PeakSampler(pid, itself=False)
    try:
        yield result
    finally:
        children_bytes = sampler.stop_bytes()
    durable_s = time.monotonic()
    observer.wait_event("RESUME", events, 5)
    grew = max(0, status_bytes(pid, "VmHWM") - resident)
    numbers = observer.execute("query-migrate")
    result.append(
        Saved(
            began_s=began_s,
            touched_s=began_s,
            durable_s=durable_s,
            downtime_ms=stopped_ms(observer.events(events)),
            file_bytes=out.stat().st_size,
            written_bytes=written_bytes(pid) - written,
            peak_bytes=grew + children_bytes,
            vmm_grew_bytes=grew,
            cpu_s=None,
            own={name: numbers.get(name) for name in ("downtime", "setup-time", "total-time")},
        )
    )


def _migrate(observer: Observer, writer: str, out: Path) -> None:
    """Migrate into a file, and sync it. The file gets its name once the writer has ended.

    Raises:
        MachineError: the migration failed, or took too long.
    """
    part = out.with_suffix(".part")
    quoted_part, quoted_out = shlex.quote(str(part)), shlex.quote(str(out))
    uri = f"exec:{writer} > {quoted_part} && mv {quoted_part} {quoted_out}"
    deadline = time.monotonic() + TIMEOUT_S
    observer.execute("migrate", {"uri": uri})
    while True:
        state = observer.execute("query-migrate")
        if state.get("status") in ("failed", "cancelled"):
            raise MachineError("QEMU's migration failed", why=state.get("error-desc"))
        if state.get("status") == "completed" and out.exists():
            break
        if time.monotonic() > deadline:
            raise MachineError(f"QEMU's migration took longer than {TIMEOUT_S:g} s")
        time.sleep(_POLL_S)
    for path in (out, out.parent):
        descriptor = os.open(path, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)
