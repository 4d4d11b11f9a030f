"""``stillframe take`` where it cannot be done: exit code, one line, nothing left behind."""

from __future__ import annotations

import json
import resource
from pathlib import Path

import pytest

from guests.qemu import GuestVm
from tests.integration.cli.program import (
    SLOW,
    left_in,
    run,
    start,
    wait_for,
)
from tests.support.guest_fixtures import GuestFactory

pytestmark = pytest.mark.qemu


def test_no_such_vm(tmp_path: Path) -> None:
    for name in ("no-such-vm", "/no/such/socket", "2147483647"):
        done = run("take", name, "-o", tmp_path / "a.still", "-q")
        assert done.returncode == 9, done.stderr
        assert done.stderr.count(b"\n") == 1
    assert run("doctor", "no-such-vm").returncode == 9
    assert left_in(tmp_path) == []


def test_the_file_exists(guest: GuestVm, snapshot: Path, tmp_path: Path) -> None:
    path = tmp_path / "a.still"
    path.write_bytes(b"precious")
    done = run("take", guest.name, "-o", path, "-q", "--json")
    assert done.returncode == 2
    assert json.loads(done.stdout)["error"] == "usage"
    assert path.read_bytes() == b"precious"
    assert run("export", snapshot, "--format", "qemu", "-o", path).returncode == 2
    assert path.read_bytes() == b"precious"
    assert run("take", guest.name, "-o", path, "-q", "--force").returncode == 0
    assert run("verify", path).returncode == 0


def test_no_directory(guest: GuestVm, snapshot: Path, tmp_path: Path) -> None:
    path = tmp_path / "none" / "a.still"
    for words in (("take", guest.name), ("export", snapshot, "--format", "raw")):
        done = run(*words, "-o", path, "-q")
        assert done.returncode == 7
        assert b"make the directory first" in done.stderr


def test_bad_sizes_touch_nothing(tmp_path: Path) -> None:
    for option in (("--spill", "-1"), ("--max-bandwidth", "0"), ("--spill", "a lot")):
        done = run("take", "no-such-vm", "-o", tmp_path / "a.still", *option)
        assert done.returncode == 2
        assert done.stderr.count(b"\n") == 1


def test_a_vm_that_is_refused(odd_vm: str, tmp_path: Path) -> None:
    done = run("take", odd_vm, "-o", tmp_path / "a.still", "-q", "--json")
    assert done.returncode == 3, done.stderr
    shown = json.loads(done.stdout)
    assert shown["error"] == "refused"
    names = [reason["name"] for reason in shown["reasons"]]
    assert {"migration-blocker", "free-page-reporting"} <= set(names)
    assert len(done.stderr.splitlines()) == len(names)
    assert left_in(tmp_path) == []
    done = run("doctor", odd_vm)
    assert done.returncode == 3
    assert b"free-page-reporting" in done.stdout
    assert b"\x1b" not in done.stdout


def test_the_vm_exits_midway(linux_guest: GuestFactory, tmp_path: Path) -> None:
    vm = linux_guest(ram_mib=128, mem_mib=16, populate_mib=32)
    process = start("take", vm.qmp_path, "-o", tmp_path / "a.still", *SLOW)
    wait_for(process, b"saving")
    vm.process.kill()
    _, err = process.communicate(timeout=60)
    assert process.returncode == 6, err
    assert b"Traceback" not in err
    assert left_in(tmp_path) == []


def test_no_room(guest: GuestVm, snapshot: Path, tmp_path: Path) -> None:
    def small_files() -> None:
        resource.setrlimit(resource.RLIMIT_FSIZE, (1 << 20, 1 << 20))

    for words in (("take", guest.name), ("export", snapshot, "--format", "elf")):
        done = run(*words, "-o", tmp_path / "a", "-q", limit=small_files)
        assert done.returncode == 7, done.stderr
        assert done.stderr.count(b"\n") == 1
        assert left_in(tmp_path) == []
    assert guest.is_progressing()
