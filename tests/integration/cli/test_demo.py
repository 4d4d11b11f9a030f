"""``stillframe demo``: for everybody, wherever userfaultfd is allowed or not."""

from __future__ import annotations

import json
import os
import pty
import re
import resource
import select
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from stillframe.board.cli import demo_ledger
from stillframe.board.cli.demo_board import number
from stillframe.cli.main import main
from stillframe.errors import MachineError
from tests.integration.cli.program import PROGRAM, run
from tests.support.ordinary_user import OrdinaryUser, ordinary_user
from tests.support.waiting import wait_until

__all__ = ["ordinary_user"]

LIMIT_S = 30.0
END_S = 60.0


def check(shown: dict[str, Any], pictures: Path) -> None:
    """What every run of the demo must have come to."""
    assert shown["sound"] is True
    assert [audit[:9] for audit in shown["audits"].values()] == ["AUDIT ok "] * 2
    assert 0 < shown["transfers_at_instant"] < shown["transfers_now"]
    assert shown["faults"] > 0
    assert shown["pages"]["faulted"] >= shown["faults"]
    assert shown["downtime_ms"] > 0
    assert shown["progress"] > 0
    instant, now = (pictures / name for name in ("instant.png", "now.png"))
    assert shown["pictures"] == {"instant": str(instant), "now": str(now)}
    assert instant.read_bytes()[:8] == now.read_bytes()[:8] == b"\x89PNG\r\n\x1a\n"
    assert instant.read_bytes() != now.read_bytes()
    assert instant.stat().st_mode & 0o777 == now.stat().st_mode & 0o777 == 0o600
    assert sorted(entry.name for entry in pictures.iterdir()) == ["instant.png", "now.png"]


@pytest.fixture
def temporary(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """Where temporary files go; in the end there must be none."""
    place = tmp_path / "t"
    place.mkdir()
    monkeypatch.setenv("TMPDIR", str(place))
    yield place
    assert list(place.iterdir()) == []


def _used_by_children_s() -> float:
    """Processor time: what passes besides is also that of others on the host."""
    usage = resource.getrusage(resource.RUSAGE_CHILDREN)
    return usage.ru_utime + usage.ru_stime


def test_demo_piped(temporary: Path, tmp_path: Path) -> None:
    before_s = _used_by_children_s()
    done = run("demo", "-o", tmp_path / "p", "--json")
    assert done.returncode == 0, done.stderr
    assert _used_by_children_s() - before_s < LIMIT_S
    assert done.stderr == b""
    check(json.loads(done.stdout), tmp_path / "p")


def test_demo_without_a_place_or_a_reader(temporary: Path, tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    done = run("demo", "-o", tmp_path / "file" / "p")
    assert done.returncode == 7
    assert done.stdout == b""
    with subprocess.Popen([*PROGRAM, "demo"], stdout=subprocess.PIPE) as process:
        assert process.stdout is not None
        process.stdout.readline()
        process.stdout.close()
        assert process.wait(END_S) == 141  # and no directory is left for pictures


def test_demo_where_userfaultfd_is_refused(temporary: Path, tmp_path: Path) -> None:
    command = [sys.executable, "-m", "tests.support.without_userfaultfd", *PROGRAM]
    done = subprocess.run(
        [*command, "demo", "-o", tmp_path / "p", "--json"],
        stdin=subprocess.DEVNULL,
        capture_output=True,
        timeout=120,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    shown = json.loads(done.stdout)
    assert shown["protection"] == "mprotect"
    check(shown, tmp_path / "p")


def test_demo_as_an_ordinary_user(ordinary_user: OrdinaryUser) -> None:
    pictures = ordinary_user.home / "pictures"
    done = ordinary_user.run("demo", "-o", pictures, "--json")
    assert done.returncode == 0, done.stderr
    shown = json.loads(done.stdout)
    assert shown["protection"] in ("userfaultfd", "userfaultfd-user")
    check(shown, pictures)


def test_demo_on_a_terminal(temporary: Path, tmp_path: Path) -> None:
    ours, theirs = pty.openpty()
    env = os.environ | {"TERM": "xterm-256color", "COLUMNS": "90"}
    env.pop("NO_COLOR", None)
    with subprocess.Popen(
        [*PROGRAM, "demo", "-o", str(tmp_path / "p")],
        stdin=theirs,
        stdout=theirs,
        stderr=subprocess.PIPE,
        env=env,
    ) as process:
        os.close(theirs)
        seen = b""
        while select.select([ours], [], [], END_S)[0]:
            try:
                seen += os.read(ours, 65536)
            except OSError:  # the other side is closed
                break
        process.communicate(timeout=60)
    os.close(ours)
    assert process.returncode == 0
    text = re.sub(r"\x1b\[[0-9;]*m", "", seen.decode()).replace("\r\n", "\n")
    assert "2. It takes a background snapshot of itself while money moves" in text
    assert re.search(r"^at the instant +now$", text, re.MULTILINE)
    assert re.search(r"^▀{43,} {3}▀{43,}$", text, re.MULTILINE)
    assert re.search(r"^downtime +\d+\.?\d* ms", text, re.MULTILINE)
    assert re.search(r"^protection +(userfaultfd|mprotect)", text, re.MULTILINE)
    assert re.search(r"^audits +both ok", text, re.MULTILINE)
    assert "\\x1b" not in text


def test_what_a_killed_demo_left_is_swept_away(tmp_path: Path) -> None:
    (tmp_path / "stillframe-demo-pictures-x").mkdir()  # of one that went well: stays
    left: list[Path] = []
    for last in (signal.SIGKILL, signal.SIGINT):
        with subprocess.Popen(
            [*PROGRAM, "demo", "-o", str(tmp_path / "p")],
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            env=os.environ | {"TMPDIR": str(tmp_path)},
        ) as process:
            assert process.stdout is not None
            while b"ledger ready" not in process.stdout.readline():
                assert process.poll() is None
            assert not any(directory.exists() for directory in left)
            left = [entry for entry in tmp_path.iterdir() if "pictures" not in entry.name]
            assert len(left) == 1
            process.send_signal(last)
            process.communicate(timeout=60)
        assert left[0].exists() == (last == signal.SIGKILL)
    assert [entry.name for entry in tmp_path.iterdir()] == ["stillframe-demo-pictures-x"]


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGKILL])
def test_the_boards_end_with_the_demo(number: signal.Signals, tmp_path: Path) -> None:
    with subprocess.Popen(
        [*PROGRAM, "demo", "-o", str(tmp_path / "p")],
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        start_new_session=True,
        env=os.environ | {"TMPDIR": str(tmp_path)},
    ) as process:
        assert process.stdout is not None
        while b"ledger ready" not in process.stdout.readline():
            assert process.poll() is None
        if number == signal.SIGINT:
            os.killpg(process.pid, number)  # as a terminal does
        else:
            process.send_signal(number)
        _, err = process.communicate(timeout=60)
    if number == signal.SIGINT:
        assert process.returncode == 130
        assert err == b"stillframe: cancelled\n"
        assert list(tmp_path.iterdir()) == []
    wait_until(
        lambda: not any(_in_session(entry, process.pid) for entry in Path("/proc").iterdir())
    )


def _in_session(entry: Path, session: int) -> bool:
    try:
        return int((entry / "stat").read_text().rpartition(")")[2].split()[3]) == session
    except (OSError, ValueError, IndexError):
        return False


class _Broken(demo_ledger.DemoBoard):
    """A second board whose pages are not of one instant."""

    def wait_loaded(self) -> None:
        super().wait_loaded()
        # What a torn page looks like to the guest's own audit.
        self._console = _Liar(self)  # type: ignore[assignment]


class _Liar:
    def __init__(self, board: demo_ledger.DemoBoard) -> None:
        self._console = board.console

    def ask(self, line: str, *starts: str) -> str:
        self._console.ask(line, *starts)
        return "AUDIT FAILED page 1 at 0x400000 is torn"

    def close(self) -> None:
        self._console.close()


def test_a_failed_audit_is_told(
    temporary: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setattr(demo_ledger, "DemoBoard", _Broken)
    assert main(["demo", "-o", str(tmp_path / "p"), "--json"]) == 11
    told = capsys.readouterr()
    assert json.loads(told.out)["error"] == "failed"
    assert "the audit of the second board failed: AUDIT FAILED page 1" in told.err


def test_numbers_of_a_guest() -> None:
    assert number("tick 3 transfers=17 gap_us=5", "gap_us") == 5
    with pytest.raises(MachineError, match="without total"):
        number("tick 3 transfers=17", "total")
