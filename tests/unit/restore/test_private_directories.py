"""Directories that end with their owners, whatever ends those."""

from __future__ import annotations

import os
import select
import signal
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from stillframe.errors import HostError
from stillframe.restore.private_directories import make_owned, remove, sweep

_OWNER = """
import os, subprocess, sys
from pathlib import Path
from stillframe.restore.private_directories import make_owned
lock_fd = make_owned(Path(sys.argv[1]))
if sys.argv[2:] == ["hand-on"]:
    child = subprocess.Popen(["sleep", "60"], pass_fds=[lock_fd], stdout=subprocess.DEVNULL)
    print(child.pid, flush=True)
else:
    print(os.getpid(), flush=True)
sys.stdin.read()
"""


@contextmanager
def owner(directory: Path, *words: str) -> Iterator[tuple[subprocess.Popen[str], int]]:
    """A process that owns the directory; and who holds the lock in the end."""
    command = [sys.executable, "-c", _OWNER, str(directory), *words]
    with subprocess.Popen(
        command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    ) as process:
        assert process.stdout is not None
        try:
            yield process, int(process.stdout.readline())
        finally:
            process.kill()


def fill(directory: Path) -> None:
    (directory / "qmp.sock").touch()
    (directory / "more" / "files").mkdir(parents=True)
    (directory / "link").symlink_to("/")


def test_what_a_killed_owner_left_is_swept_away(tmp_path: Path) -> None:
    directory = tmp_path / "vm-1"
    with owner(directory) as (process, _):
        fill(directory)
        assert directory.stat().st_mode & 0o777 == 0o700
        sweep(tmp_path)
        assert (directory / "qmp.sock").exists(), "its owner lives"
        process.send_signal(signal.SIGKILL)
        process.wait()
        assert directory.exists()
        sweep(tmp_path)
    assert list(tmp_path.iterdir()) == []


def test_who_inherits_the_lock_owns_it(tmp_path: Path) -> None:
    directory = tmp_path / "vm-1"
    with owner(directory, "hand-on") as (process, child):
        try:
            process.send_signal(signal.SIGKILL)
            process.wait()
            sweep(tmp_path)
            assert directory.exists()
        finally:
            pidfd = os.pidfd_open(child)
            os.kill(child, signal.SIGKILL)
            select.select([pidfd], [], [], 20)
            os.close(pidfd)
        sweep(tmp_path)
        assert not directory.exists()


def test_what_is_not_known_to_be_ours_stays(tmp_path: Path) -> None:
    foreign = tmp_path / "elsewhere"
    os.close(make_owned(foreign))  # nobody's any more
    root = tmp_path / "root"
    for name in ("without-a-lock", "stillframe-demo-1", "stillframe-demo-2"):
        (root / name).mkdir(parents=True)
    (root / "file").touch()
    (root / "link").symlink_to(foreign)
    (root / "stillframe-demo-1" / "owner.lock").touch()
    (root / "stillframe-demo-2" / "owner.lock").symlink_to(foreign / "owner.lock")
    sweep(root, "stillframe-other-")
    assert len(list(root.iterdir())) == 5
    sweep(root)
    assert sorted(entry.name for entry in root.iterdir()) == [
        "file",
        "link",
        "stillframe-demo-2",
        "without-a-lock",
    ]
    assert foreign.exists()
    sweep(tmp_path / "none")


@pytest.mark.skipif(os.geteuid() != 0, reason="missing root, to give a directory away")
def test_what_belongs_to_somebody_else_stays(tmp_path: Path) -> None:
    directory = tmp_path / "vm-1"
    os.close(make_owned(directory))
    os.chown(directory, 65534, 65534)
    sweep(tmp_path)
    assert directory.exists()
    remove(directory)


def test_it_has_no_name_before_it_is_locked(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen: list[list[str]] = []
    rename = Path.rename

    def look(self: Path, target: Path) -> Path:
        sweep(tmp_path)
        seen.append([entry.name for entry in self.iterdir()])
        return rename(self, target)

    monkeypatch.setattr(Path, "rename", look)
    os.close(make_owned(tmp_path / "vm-1"))
    assert seen == [["owner.lock"]]


def test_there_is_no_place_for_it(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(HostError, match="cannot make the directory"):
        make_owned(tmp_path / "file" / "vm-1")
    (tmp_path / "vm-1").mkdir()
    (tmp_path / "vm-1" / "x").touch()
    with pytest.raises(HostError, match="cannot make the directory"):
        make_owned(tmp_path / "vm-1")
    assert sorted(os.listdir(tmp_path)) == ["file", "vm-1"]
