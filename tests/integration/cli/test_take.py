"""``stillframe take`` on a real guest: what it shows, and how it is cancelled."""

from __future__ import annotations

import json
import os
import pty
import re
import signal
import stat
import subprocess
from pathlib import Path
from typing import Any

import pytest

from guests.qemu import GuestVm
from tests.integration.cli.program import (
    COLOUR,
    PROGRAM,
    SLOW,
    left_in,
    on_terminal,
    run,
    start,
    wait_for,
)

pytestmark = pytest.mark.qemu

SAVING = "stillframe: saving"
"""Told again and again."""

TAKE_KEYS: dict[str, Any] = {
    "id": str,
    "file": str,
    "downtime_ms": float,
    "downtime": {"stop_ms", "drain_ms", "devices_ms", "disks_ms", "protect_ms", "cont_ms"},
    "arm_ms": float,
    "total_ms": float,
    "ram_bytes": int,
    "file_bytes": int,
    "pages": {"total", "zero", "data", "faulted", "never_populated", "unchanged"},
    "faults": int,
    "fault_p50_us": float,
    "fault_p99_us": float,
    "fault_max_us": float,
    "stall_ms": float,
    "writes_while_stopped": list,
    "protection": str,
}


def test_take_piped(guest: GuestVm, tmp_path: Path) -> None:
    path = tmp_path / "a.still"
    done = run("take", guest.name, "-o", path, "--json")
    assert done.returncode == 0, done.stderr
    shown = json.loads(done.stdout)
    for key, kind in TAKE_KEYS.items():
        if isinstance(kind, set):
            assert set(shown[key]) == kind
        else:
            assert isinstance(shown[key], kind), key
    assert {"notes", "spill_peak_bytes", "state", *TAKE_KEYS} <= set(shown)
    assert shown["file"] == str(path)
    assert shown["file_bytes"] == path.stat().st_size
    assert shown["downtime_ms"] == pytest.approx(sum(shown["downtime"].values()))
    assert shown["pages"]["total"] * 4096 >= shown["ram_bytes"] >= 192 << 20
    assert stat.S_IMODE(path.stat().st_mode) == 0o600
    lines = done.stderr.decode().splitlines()
    assert [line for line in lines if line.startswith(SAVING)]
    assert all(line.startswith("stillframe: ") for line in lines)
    assert b"\x1b" not in done.stdout + done.stderr
    assert guest.is_progressing()


def test_take_for_people(guest: GuestVm, tmp_path: Path) -> None:
    done = run("take", guest.qmp_path, "-o", tmp_path / "a.still", "--quiet")
    assert done.returncode == 0
    assert done.stderr == b""
    text = done.stdout.decode()
    assert re.search(r"^downtime +\d+\.\d ms \(stop .*cont .*\)$", text, re.MULTILINE)
    assert re.search(r"^id +[0-9a-f]{64}$", text, re.MULTILINE)


def test_take_on_a_terminal(guest: GuestVm, tmp_path: Path) -> None:
    words = ("take", guest.process.pid, "--max-bandwidth", "40M", "-o")
    code, out, seen = on_terminal(*words, tmp_path / "a.still")
    assert code == 0, seen
    assert b"\x1b" not in out
    assert COLOUR.search(seen)
    assert b"saving" in seen
    assert b"faults, spill" in seen
    code, out, seen = on_terminal(*words, tmp_path / "b.still", environment={"NO_COLOR": "1"})
    assert code == 0
    assert b"saving" in seen
    assert not [part for part in COLOUR.findall(seen) if re.search(rb"[34]\d|38;", part)]
    code, out, seen = on_terminal(*words, tmp_path / "c.still", environment={"TERM": "dumb"})
    assert code == 0
    assert b"stillframe: saving" in seen
    assert b"\x1b" not in seen


def test_take_to_a_pipe(guest: GuestVm, tmp_path: Path) -> None:
    path = tmp_path / "a.still"
    with path.open("wb") as out:
        done = run("take", guest.name, "-o", "-", "--json", "-q", stdout=out)
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stderr)["file"] == "standard output"
    assert run("verify", path).returncode == 0


def test_take_not_to_a_terminal(guest: GuestVm) -> None:
    ours, theirs = pty.openpty()
    done = run("take", guest.name, "-o", "-", stdout=theirs)
    os.close(theirs)
    os.close(ours)
    assert done.returncode == 2
    assert b"standard output is a terminal; send it to a file or a pipe" in done.stderr


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGHUP])
def test_cancel(number: signal.Signals, guest: GuestVm, tmp_path: Path) -> None:
    process = start("take", guest.name, "-o", tmp_path / "a.still", *SLOW)
    wait_for(process, b"saving")
    process.send_signal(number)
    out, err = process.communicate(timeout=60)
    assert process.returncode == 130
    assert out == b""
    lines = [line for line in err.decode().splitlines() if not line.startswith(SAVING)]
    assert lines[0] == "stillframe: cancelling; the guest goes on"
    assert lines[-1] == "stillframe: the snapshot was cancelled [guest running]"
    assert left_in(tmp_path) == []
    assert guest.is_progressing()


def test_a_second_ctrl_c(guest: GuestVm, tmp_path: Path) -> None:
    # The job hangs at a fault point for a minute, so that the second one comes in time.
    process = subprocess.Popen(
        [*PROGRAM, "take", str(guest.name), "-o", tmp_path / "a.still"],
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        bufsize=0,
        env=os.environ | {"STILLFRAME_FAULT": "attached=hang"},
    )
    try:
        wait_for(process, b"attaching")
        process.send_signal(signal.SIGINT)
        wait_for(process, b"cancelling")
        process.send_signal(signal.SIGINT)
        wait_for(process, b"already cancelling; please wait")
    finally:
        process.kill()
        process.communicate()
    assert left_in(tmp_path) == []
    assert guest.is_progressing()


def test_the_second_snapshotter(guest: GuestVm, tmp_path: Path) -> None:
    first = start("take", guest.name, "-o", tmp_path / "a.still", *SLOW)
    try:
        wait_for(first, b"saving")
        done = run("take", guest.name, "-o", tmp_path / "b.still", "-q")
        assert done.returncode == 4
        assert done.stderr.startswith(b"stillframe: ")
        assert done.stderr.count(b"\n") == 1
    finally:
        first.terminate()
        first.communicate(timeout=60)
    assert left_in(tmp_path) == []


def test_an_internal_error(guest: GuestVm, tmp_path: Path) -> None:
    env = os.environ | {"STILLFRAME_FAULT": "armed"}
    done = run("take", guest.name, "-o", tmp_path / "a.still", "-q", env=env)
    assert done.returncode == 70
    assert b"[guest running]" in done.stderr
    assert b"Traceback" not in done.stderr
    done = run("take", guest.name, "-o", tmp_path / "a.still", env=env | {"STILLFRAME_DEBUG": "1"})
    assert b"Traceback" in done.stderr
    assert left_in(tmp_path) == []
    assert guest.is_progressing()
