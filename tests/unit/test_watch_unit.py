"""The systemd unit for ``watch``: the wheel has it, and systemd understands it."""

from __future__ import annotations

import importlib.metadata
import shutil
import subprocess
from pathlib import Path

import pytest

NAME = "stillframe-watch@.service"


@pytest.fixture
def unit() -> Path:
    """As it was installed."""
    files = importlib.metadata.files("stillframe") or []
    (found,) = (Path(str(file.locate())) for file in files if file.name == NAME)
    return found


def test_it_is_installed_as_it_is_shipped(unit: Path) -> None:
    assert unit.parent.parts[-3:] == ("share", "stillframe", "systemd")
    assert unit.read_bytes() == (Path("packaging") / NAME).read_bytes()


@pytest.mark.skipif(shutil.which("systemd-analyze") is None, reason="no systemd-analyze here")
def test_systemd_understands_it(unit: Path, tmp_path: Path) -> None:
    program = shutil.which("true")
    text = unit.read_text().replace("/usr/bin/stillframe", str(program))
    instance = tmp_path / NAME.replace("@", "@web1")
    instance.write_text(text)
    done = subprocess.run(
        ["systemd-analyze", "verify", instance], capture_output=True, text=True, check=False
    )
    assert (done.returncode, done.stderr) == (0, "")
