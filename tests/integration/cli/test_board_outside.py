"""A running board from outside: ps, doctor, take, verify, show and restore, as on a QEMU."""

from __future__ import annotations

import json
import os
import shutil
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

import stillframe
from stillframe.version import __version__
from tests.integration.cli.program import run
from tests.support.board_process import BoardProcess, end, ledger, restored, transfers
from tests.support.ordinary_user import OrdinaryUser, ordinary_user
from tests.support.probes import has_uffd_wp
from tests.support.waiting import wait_until

__all__ = ["ordinary_user"]

RAM = 32 << 20


@pytest.fixture(scope="module", autouse=True)
def _needs_uffd() -> None:
    has_uffd_wp().require()


@pytest.fixture(scope="module")
def board(tmp_path_factory: pytest.TempPathFactory) -> Iterator[BoardProcess]:
    """The ledger on two vCPUs, with a disk."""
    directory = tmp_path_factory.mktemp("board")
    disk = directory / "disk.img"
    disk.write_bytes(bytes(1 << 20))
    words = ("--ram", RAM, "--cpus", 2, "--disk", disk)
    with ledger(*words, options="rate=20 dma=entropy tick_ms=100", directory=directory) as board:
        yield board


@pytest.fixture(scope="module")
def snapshot(board: BoardProcess, tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("snapshot") / "a.still"
    done = run("take", board.name, "-o", path, "--json")
    assert done.returncode == 0, done.stderr
    shown = json.loads(done.stdout)
    assert shown["protection"] == "userfaultfd"
    assert shown["ram_bytes"] == RAM + 640 * 480 * 4
    return path


def _listed(board: BoardProcess, shown: bytes) -> dict[str, Any]:
    (found,) = (vm for vm in json.loads(shown) if vm["pid"] == board.pid)
    return found  # type: ignore[no-any-return]


def test_ps(board: BoardProcess) -> None:
    found: list[dict[str, Any]] = []

    def has_answered() -> bool:  # it is asked for a moment only
        found.append(_listed(board, run("ps", "--json").stdout))
        return found[-1]["status"] is not None

    wait_until(has_answered)
    assert found[-1] == {
        "pid": board.pid,
        "name": board.name,
        "uid": os.getuid(),
        "vmm": "board",
        "version": __version__,
        "accelerator": "unicorn",
        "ram_bytes": RAM,
        "qmp": [str(board.qmp)],
        "status": "running",
        "snapshotable": True,
        "reasons": [],
        "restored_from": None,
        "resident": None,
        "resident_ms": None,
        "without_disks": False,
        "forwards": [],
    }
    assert f" {board.name} " in run("ps").stdout.decode()


def test_doctor(board: BoardProcess) -> None:
    done = run("doctor", board.name, "--json")
    shown = json.loads(done.stdout)
    assert done.returncode == 0, shown
    by_name = {check["name"]: check for check in shown["checks"]}
    assert "machine stillframe-board-1" in by_name["monitor"]["found"]
    assert by_name["right"]["status"] == by_name["userfaultfd"]["status"] == "ok"
    blocks = [check["found"] for check in shown["checks"] if check["name"] == "ram-block"]
    assert [block.partition(":")[0] for block in blocks] == ["board.ram", "board.vram"]
    assert "shared memfd" in blocks[0]


def test_verify_and_show(board: BoardProcess, snapshot: Path) -> None:
    assert run("verify", snapshot, "-q").returncode == 0
    shown = json.loads(run("show", snapshot, "--json").stdout)
    machine = shown["machine"]
    assert (machine["vmm"], machine["machine_type"]) == ("board", "stillframe-board-1")
    assert (machine["accelerator"], machine["vcpus"], machine["pid"]) == ("unicorn", 2, board.pid)
    assert machine["argv"][:4] == ["stillframe", "board", "run", "ledger"]
    assert machine["disks"][0]["filename"].endswith("/disk.img")
    assert {part["idstr"]: part["gpa"] for part in shown["memory_map"]} == {
        "board.ram": 0,
        "board.vram": 0xE0000000,
    }
    names = {device["idstr"] for device in shown["devices"]}
    assert {"globalstate", "cpu", "serial", "clock", "block", "framebuffer"} <= names
    assert f"{board.name}: stillframe-board-1" in run("show", snapshot).stdout.decode()


def test_restore(board: BoardProcess, snapshot: Path) -> None:
    done = run("restore", snapshot, "--json")
    assert done.returncode == 0, done.stderr
    shown = json.loads(done.stdout)
    assert shown["state"] == "running"
    assert shown["argv"][:6] == [sys.executable, "-P", "-m", "stillframe", "board", "run"]
    with restored(done.stdout) as console:
        console.send("a")
        audit = console.wait("AUDIT")
        assert audit.startswith("AUDIT ok"), audit
        again = run("take", shown["pid"], "-o", snapshot.with_name("again.still"), "-q")
        assert again.returncode == 0, again.stderr
        copy = Path(shown["disk_directory"]) / "disk0.raw"
        assert copy.stat().st_size == 1 << 20
    assert board.audit().startswith("AUDIT ok")
    assert transfers(board.audit()) > transfers(audit)


def test_what_a_killed_restored_board_left_is_swept_away(
    snapshot: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """But not its disks, which hold what it wrote."""
    monkeypatch.setenv("XDG_RUNTIME_DIR", str(tmp_path))
    tmp_path.chmod(0o700)
    told: list[dict[str, Any]] = []
    running: list[int] = []
    try:
        for _ in range(3):
            done = run("restore", snapshot, "--json", "-q")
            assert done.returncode == 0, done.stderr
            told.append(json.loads(done.stdout))
            running.append(told[-1]["pid"])
            if len(told) == 1:
                end(running.pop())
                assert Path(told[0]["directory"]).exists()
        assert not Path(told[0]["directory"]).exists()
        assert Path(told[0]["disk_directory"], "disk0.raw").exists()
        assert Path(told[1]["qmp"]).is_socket(), "its board runs"
    finally:
        for pid in running:
            end(pid)
        for one in told:
            shutil.rmtree(one["disk_directory"])


def test_the_restored_board_is_this_very_stillframe(snapshot: Path) -> None:
    """Also where that was found by a relative path; the board runs in another directory."""
    own = os.path.relpath(Path(stillframe.__file__).parents[1])
    done = run("restore", snapshot, "--json", "-q", env=os.environ | {"PYTHONPATH": own})
    assert done.returncode == 0, done.stderr
    with restored(done.stdout):
        pid = json.loads(done.stdout)["pid"]
        assert os.readlink(f"/proc/{pid}/cwd") == "/"
        environment = Path(f"/proc/{pid}/environ").read_bytes().split(b"\0")
        (path,) = (entry for entry in environment if entry.startswith(b"PYTHONPATH="))
        assert path.split(b"=")[1].split(b":")[0] == os.fsencode(os.path.abspath(own))


def test_restore_paused_with_options_of_ones_own(snapshot: Path, tmp_path: Path) -> None:
    socket = tmp_path / "qmp"
    words = ("--qmp", socket, "--paused", "--json", "--", "--name", "other", "--disk")
    disk = tmp_path / "own.img"
    disk.write_bytes(bytes(1 << 20))
    done = run("restore", snapshot, *words, disk)
    assert done.returncode == 0, done.stderr
    with restored(done.stdout):
        shown = json.loads(done.stdout)
        assert (shown["state"], shown["qmp"]) == ("paused", str(socket))
        assert shown["disk_directory"] is None
        (found,) = (vm for vm in json.loads(run("ps", "--json").stdout) if vm["name"] == "other")
        assert (found["pid"], found["status"]) == (shown["pid"], "paused")


def test_restore_dry_run(snapshot: Path) -> None:
    done = run("restore", snapshot, "--dry-run", "--json")
    shown = json.loads(done.stdout)
    assert done.returncode == 0, shown
    assert not Path(shown["directory"]).exists()
    assert {(touch["access"], touch["kind"]) for touch in shown["touches"]} >= {
        ("run", "program"),
        ("listen", "socket"),
        ("read", "file"),
        ("create", "file"),
    }
    text = run("restore", snapshot, "--dry-run").stdout.decode()
    assert "stillframe board run" in text
    assert "a private copy" in text


def test_a_snapshot_that_does_not_fit(snapshot: Path) -> None:
    done = run("restore", snapshot, "--json", "-q", "--", "--cpus", "1")
    assert done.returncode == 6
    what = json.loads(done.stdout)
    assert "the board" in what["what"]
    assert "cpu" in what["why"]
    assert not any("tests" in line for line in done.stderr.decode().splitlines())


def test_restore_wants_trust(snapshot: Path, tmp_path: Path) -> None:
    path = tmp_path / "a.still"
    path.write_bytes(snapshot.read_bytes())
    path.chmod(0o666)
    assert run("restore", path, "-q").returncode == 10
    assert run("restore", path, "--dry-run").returncode == 0


def test_take_in_a_stop(board: BoardProcess, tmp_path: Path) -> None:
    done = run("take", board.pid, "-o", tmp_path / "a.still", "--mode", "stop", "--json", "-q")
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout)["protection"] is None
    assert board.audit().startswith("AUDIT ok")


def test_an_imported_stream_is_restored(snapshot: Path, tmp_path: Path) -> None:
    stream, path = tmp_path / "stream", tmp_path / "b.still"
    assert run("export", snapshot, "--format", "qemu", "-o", stream).returncode == 0
    assert run("import", stream, "-o", path, "-q").returncode == 0
    disk = tmp_path / "own.img"
    disk.write_bytes(bytes(1 << 20))
    words = ("--cpus", "2", "--disk", disk, "--serial", f"unix:{tmp_path}/s")
    done = run("restore", path, "--json", "-q", "--", *words)
    assert done.returncode == 0, done.stderr
    with restored(done.stdout) as console:
        console.send("a")
        assert console.wait("AUDIT").startswith("AUDIT ok")


# Rights


def test_an_ordinary_users_own_board(ordinary_user: OrdinaryUser, tmp_path: Path) -> None:
    home, environment = ordinary_user.home, ordinary_user.environment
    program = ordinary_user.command()
    with ledger(
        "--ram", "16M", program=program, environment=environment, directory=home, name="mine"
    ) as board:
        found = _listed(board, ordinary_user.run("ps", "--json").stdout)
        assert (found["snapshotable"], found["reasons"]) == (True, [])
        done = ordinary_user.run("doctor", "mine", "--json")
        assert done.returncode == 0, done.stdout
        done = ordinary_user.run("take", "mine", "-o", home / "a.still", "--json")
        assert done.returncode == 0, done.stderr
        expected = "userfaultfd" if _anybody_may() else "userfaultfd-user"
        assert json.loads(done.stdout)["protection"] == expected
        assert board.audit().startswith("AUDIT ok")
        done = ordinary_user.run("restore", home / "a.still", "--json")
        assert done.returncode == 0, done.stderr
        with restored(done.stdout) as console:
            console.send("a")
            assert console.wait("AUDIT").startswith("AUDIT ok")


def _anybody_may() -> bool:
    return Path("/proc/sys/vm/unprivileged_userfaultfd").read_text().strip() != "0"


def test_a_board_of_somebody_else(board: BoardProcess, ordinary_user: OrdinaryUser) -> None:
    found = _listed(board, ordinary_user.run("ps", "--json").stdout)
    assert (found["vmm"], found["name"], found["ram_bytes"]) == ("board", board.name, RAM)
    assert found["snapshotable"] is None
    (reason,) = found["reasons"]
    assert "may not connect" in reason
    done = ordinary_user.run("take", board.name, "-o", ordinary_user.home / "x.still")
    assert done.returncode == 5


def test_a_board_where_userfaultfd_is_refused(tmp_path: Path) -> None:
    program = (sys.executable, "-m", "tests.support.without_userfaultfd")
    program += (sys.executable, "-m", "stillframe")
    with ledger("--ram", "16M", program=program) as board:
        done = run("take", board.name, "-o", tmp_path / "a.still", "-q")
        assert done.returncode == 3
        assert b"seccomp filter does not allow userfaultfd" in done.stderr
        assert b"let the board take it itself: 'migrate'" in done.stderr
        assert done.stderr.endswith(b"[guest running]\n")
        assert board.audit().startswith("AUDIT ok")
