"""Snapshots of test guests: in this process, and by the command line in another one."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any, Protocol

from guests.consistency import ConsistencyReport, check_pages
from guests.qemu import RAM_ID, GuestVm
from stillframe.machine.finding import connect
from stillframe.model import Statistics
from stillframe.snapshot.job import SnapshotJob
from stillframe.snapshot.options import SnapshotOptions
from stillframe.snapshot.take import take_snapshot
from stillframe.snapshot.taken import TakenSnapshot
from stillframe.store import open_snapshot
from stillframe.store.backends.local import LocalSink

TAKE_TIMEOUT_S = 120.0
PATIENT_MS = 60_000.0
"""For ``max_drain_ms``: on a busy host a disk's request may take longer than a take allows."""
PATIENT = ("--max-drain", f"{PATIENT_MS:.0f}")
REPOSITORY = Path(__file__).resolve().parents[2]


class TakenFrom(Protocol):
    """A running guest of another process."""

    @property
    def qmp_path(self) -> Path:
        """Its monitor."""
        ...

    def is_progressing(self, within_s: float = 60.0) -> bool:
        """Whether its guest is seen to go on within that time."""
        ...


def take(vm: TakenFrom, file: Path, **options: Any) -> TakenSnapshot:
    """Take a snapshot in this process; ``options`` are those of SnapshotOptions."""
    with connect(str(vm.qmp_path)) as machine:
        job = SnapshotJob(
            lambda control: take_snapshot(
                control, machine, LocalSink(file), SnapshotOptions(**options)
            )
        )
        return job.wait(TAKE_TIMEOUT_S)


def ram_block(vm: GuestVm) -> str:
    """The name of the guest's main RAM block."""
    return "pc.ram" if vm.memory == "private" else RAM_ID


def consistency(vm: GuestVm, file: Path) -> ConsistencyReport:
    """Whether the guest's pages in a snapshot are those of one instant."""
    with open_snapshot(file) as snapshot:
        return check_pages(
            page for _, page in snapshot.iter_pages(ram_block(vm)) if page is not None
        )


def command(*arguments: str) -> list[str]:
    """The command line tool of this checkout."""
    return [sys.executable, "-m", "stillframe", *arguments]


def start_take(
    vm: TakenFrom, file: Path, *arguments: str, fault: str = ""
) -> subprocess.Popen[str]:
    """``stillframe take`` in a process of its own."""
    return subprocess.Popen(
        command("take", str(vm.qmp_path), "-o", str(file), "--json", *arguments),
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        cwd=REPOSITORY,
        env=os.environ | {"STILLFRAME_FAULT": fault},
    )


def finish(process: subprocess.Popen[str]) -> tuple[int, dict[str, Any], str]:
    """Wait for the tool; its exit code, its JSON, and what it said on standard error."""
    output, complaints = process.communicate(timeout=TAKE_TIMEOUT_S)
    return process.returncode, json.loads(output) if output.strip() else {}, complaints


def assert_unharmed(vm: GuestVm, directory: Path) -> None:
    """The guest goes on, nothing was left in ``directory``, and the next snapshot works."""
    assert vm.is_progressing(), "the guest does not go on"
    assert sorted(os.listdir(directory)) == [], "something was left behind"
    file = directory / "next.still"
    statistics: Statistics = take(vm, file).statistics
    assert statistics.state == "completed"
    report = consistency(vm, file)
    assert report.consistent, str(report)
    file.unlink()
