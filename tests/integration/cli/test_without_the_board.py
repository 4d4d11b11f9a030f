"""Everything for QEMU works without the board: its engine not installed, or the wing not there."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import msgspec
import pytest

import stillframe
from tests.support.bare_vm import BareVm
from tests.support.probes import has_qemu, has_uffd_wp
from tests.unit.restore.recorded import machine, write_snapshot

KINDS = ("no engine", "no wing")


class Installation:
    """A copy of the installed package without a part of it."""

    def __init__(self, site: Path, kind: str) -> None:
        self._site = site
        self.has_wing = kind == "no engine"
        package = site / "stillframe"
        shutil.copytree(Path(stillframe.__file__).parent, package)
        if self.has_wing:
            (site / "sitecustomize.py").write_text("import sys; sys.modules['unicorn'] = None")
        else:
            shutil.rmtree(package / "board")

    def run(self, *words: str, status: int = 0) -> str:
        """Run the program; its output, or what it said on standard error if it fails."""
        done = subprocess.run(
            [sys.executable, "-P", "-m", "stillframe", *words],
            env=os.environ | {"PYTHONPATH": str(self._site)},
            capture_output=True,
            text=True,
            timeout=120,
            check=False,
        )
        assert done.returncode == status, done.stderr
        assert "Traceback" not in done.stderr
        return done.stderr if status else done.stdout


@pytest.fixture(params=KINDS)
def without(request: pytest.FixtureRequest, tmp_path: Path) -> Installation:
    return Installation(tmp_path / "site", request.param)


def test_help_lists_what_there_is(without: Installation) -> None:
    shown = without.run("--help")
    assert "take" in shown
    assert ("  board " in shown, "  demo " in shown) == (without.has_wing, without.has_wing)
    failure = without.run("board", "run", "ledger", status=5 if without.has_wing else 2)
    assert ("pip install 'stillframe[board]'" in failure) == without.has_wing


def test_files_and_the_host_are_looked_at(without: Installation, tmp_path: Path) -> None:
    file = str(write_snapshot(tmp_path / "a.still", machine(["-m", "16"])))
    assert without.run("show", file).startswith("snapshot ")
    assert without.run("verify", file)
    assert "pc-q35-7.2" in without.run("restore", file, "--dry-run", "--program", "true")
    checks = json.loads(without.run("doctor", "--json"))["checks"]
    assert ("board" in {check["name"] for check in checks}) == without.has_wing


def test_a_snapshot_of_a_board_is_planned_or_refused(without: Installation, tmp_path: Path) -> None:
    words = ("stillframe", "board", "run", "life")
    record = msgspec.structs.replace(machine([]), vmm="board", argv=words)
    file = str(write_snapshot(tmp_path / "a.still", record))
    shown = without.run("restore", file, "--dry-run", status=0 if without.has_wing else 5)
    assert ("board run life" if without.has_wing else "kind 'board'") in shown


@pytest.mark.qemu
def test_a_qemu_is_found_and_taken(without: Installation, tmp_path: Path) -> None:
    has_uffd_wp().require()
    has_qemu().require()
    file = str(tmp_path / "a.still")
    with BareVm("-m", "32") as vm:
        assert str(vm.pid) in without.run("ps")
        without.run("take", str(vm.pid), "-o", file)
    assert without.run("verify", file)
