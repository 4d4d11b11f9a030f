"""``stillframe restore``: a new VM, its plan, and trust."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest

from tests.integration.cli.program import (
    run,
)
from tests.support.board_process import end

pytestmark = pytest.mark.qemu


def test_restore(snapshot: Path, tmp_path: Path) -> None:
    socket = tmp_path / "qmp"
    done = run("restore", snapshot, "--qmp", socket, "--json")
    assert done.returncode == 0, done.stderr
    shown = json.loads(done.stdout)
    try:
        assert shown["state"] == "running"
        assert shown["qmp"] == str(socket)
        ours = [vm for vm in json.loads(run("ps", "--json").stdout) if vm["pid"] == shown["pid"]]
        assert ours[0]["qmp"] == [str(socket)]
        again = run("take", shown["pid"], "-o", tmp_path / "again.still", "-q")
        assert again.returncode == 0, again.stderr
    finally:
        end(shown["pid"])
        shutil.rmtree(shown["directory"], ignore_errors=True)


def test_what_a_killed_restored_vm_left_is_swept_away(
    snapshot: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("XDG_RUNTIME_DIR", str(tmp_path))
    tmp_path.chmod(0o700)
    directories, running = [], []
    try:
        for _ in range(3):
            done = run("restore", snapshot, "--json", "-q", "--paused")
            assert done.returncode == 0, done.stderr
            shown = json.loads(done.stdout)
            directories.append(Path(shown["directory"]))
            running.append(shown["pid"])
            if len(running) == len(directories) == 1:
                end(running.pop())
                assert directories[0].exists()
        assert [directory.exists() for directory in directories] == [False, True, True]
    finally:
        for pid in running:
            end(pid)


def test_restore_dry_run(snapshot: Path) -> None:
    done = run("restore", snapshot, "--dry-run", "--json", "--", "-m", "1G")
    assert done.returncode == 0, done.stderr
    shown = json.loads(done.stdout)
    assert shown["needs_trust"] == []
    assert shown["argv"][shown["argv"].index("-m") + 1] == "1G"
    assert [touch for touch in shown["touches"] if touch["access"] == "run"]
    assert not Path(shown["directory"]).exists()
    text = run("restore", snapshot, "--dry-run").stdout.decode()
    assert "-incoming" in text
    assert "it touches" in text


def test_restore_wants_trust(snapshot: Path, tmp_path: Path) -> None:
    path = tmp_path / "a.still"
    shutil.copy(snapshot, path)
    path.chmod(0o666)
    done = run("restore", path, "-q", "--json")
    assert done.returncode == 10
    assert json.loads(done.stdout)["error"] == "trust"
    assert b"--trust" in done.stderr
    assert run("restore", path, "--dry-run").returncode == 0
