"""``doctor`` and ``ps``."""

from __future__ import annotations

import json
import re
import time
from collections.abc import Callable
from typing import Any

import pytest

from guests.qemu import GuestVm
from tests.integration.cli.program import (
    run,
)

pytestmark = pytest.mark.qemu


def test_doctor(guest: GuestVm) -> None:
    done = run("doctor", guest.name, "--json")
    shown = json.loads(done.stdout)
    assert done.returncode == 0, shown
    assert shown["fine"] is True
    by_name = {check["name"]: check for check in shown["checks"]}
    assert {"kernel", "userfaultfd", "ptrace", "attach", "memfd", "zstd", "space"} <= set(by_name)
    assert by_name["ram"]["subject"] == "vm"
    assert re.search(r"arming takes about \d+ ms", by_name["ram"]["found"])
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
    assert re.fullmatch(r"\d+\.\d+\.\d+", shown["qemu_version"])
    text = run("ps").stdout.decode()
    assert text.splitlines()[0].split()[:2] == ["PID", "NAME"]
    assert str(guest.name) in text


def _until(
    look: Callable[[], dict[str, Any]], good: Callable[[dict[str, Any]], bool]
) -> dict[str, Any]:
    """Another process may hold the monitor for a moment."""
    found = look()
    for _ in range(5):
        if good(found):
            break
        time.sleep(0.5)
        found = look()
    return found
