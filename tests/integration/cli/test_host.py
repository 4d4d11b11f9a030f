"""``doctor`` and ``ps``."""

from __future__ import annotations

import json
import os
import re
import subprocess
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from guests.qemu import GuestVm, qemu_binary
from tests.integration.cli.program import (
    run,
)
from tests.support.listening import wait_listening
from tests.support.ordinary_user import AS_NOBODY, OrdinaryUser, ordinary_user

pytestmark = pytest.mark.qemu

__all__ = ["ordinary_user"]


def test_doctor(guest: GuestVm) -> None:
    done = run("doctor", guest.name, "--json")
    shown = json.loads(done.stdout)
    assert done.returncode == 0, shown
    assert shown["fine"] is True
    by_name = {check["name"]: check for check in shown["checks"]}
    assert {"kernel", "userfaultfd", "ptrace", "attach", "memfd", "zstd", "space"} <= set(by_name)
    assert by_name["ram"]["subject"] == "vm"
    assert re.search(r"arming takes at most about \d+ ms", by_name["ram"]["found"])
    assert guest.is_progressing()


def test_ps(guest: GuestVm) -> None:
    def ours() -> dict[str, Any]:
        done = run("ps", "--json")
        assert done.returncode == 0, done.stderr
        return next(vm for vm in json.loads(done.stdout) if vm["pid"] == guest.process.pid)

    shown = _until(ours, lambda vm: vm["snapshotable"] is not None)
    assert shown["name"] == guest.name
    assert shown["snapshotable"] is True
    assert shown["ram_bytes"] == 192 << 20
    assert shown["qmp"] == [str(guest.qmp_path)]
    assert shown["accelerator"] == "tcg"
    assert re.fullmatch(r"\d+\.\d+\.\d+", shown["version"])
    text = run("ps").stdout.decode()
    assert text.splitlines()[0].split()[:2] == ["PID", "NAME"]
    assert str(guest.name) in text


def test_ps_says_when_only_a_right_is_missing(ordinary_user: OrdinaryUser) -> None:
    """An ordinary user's own QEMU: its RAM may be read, but userfaultfd may not be used."""
    if Path("/proc/sys/vm/unprivileged_userfaultfd").read_text().strip() != "0":
        pytest.skip("missing userfaultfd-denied: vm.unprivileged_userfaultfd is set")
    home, name = ordinary_user.home, f"plain-{os.getpid()}"
    command = [*AS_NOBODY, qemu_binary(), "-display", "none", "-serial", "null", "-S"]
    command += ["-monitor", "none", "-accel", "tcg", "-m", "32", "-name", name]
    command += ["-qmp", f"unix:{home}/qemu.qmp,server=on,wait=off"]
    process = subprocess.Popen(command, stdin=subprocess.DEVNULL)
    try:
        wait_listening(home / "qemu.qmp", alive=lambda: process.poll() is None)

        def ours() -> dict[str, Any]:
            listed = json.loads(ordinary_user.run("ps", "--json").stdout)
            return next(vm for vm in listed if vm["pid"] == process.pid)

        shown = _until(ours, lambda vm: vm["snapshotable"] is not None)
        assert shown["snapshotable"] is False
        (reason,) = shown["reasons"]
        assert reason.startswith("userfaultfd is not allowed here")
        assert "run as root" in reason
        done = ordinary_user.run("doctor", name, "--json")
        assert done.returncode == 5
        failed = [c["name"] for c in json.loads(done.stdout)["checks"] if c["status"] == "fail"]
        assert failed == ["userfaultfd", "attach", "right"]
        done = ordinary_user.run("take", name, "-o", home / "never.still")
        assert done.returncode == 5
        assert not (home / "never.still").exists()
    finally:
        process.kill()
        process.wait()


def _until(
    look: Callable[[], dict[str, Any]], good: Callable[[dict[str, Any]], bool]
) -> dict[str, Any]:
    """Another process may hold the monitor for a moment, and it is asked for a moment only."""
    found = look()
    deadline = time.monotonic() + 60
    while not good(found) and time.monotonic() < deadline:
        time.sleep(0.5)
        found = look()
    return found
