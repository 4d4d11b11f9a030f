"""The engine under hostile hands, and the hand-over of the GIL."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

from stillframe.board.hardware.run_control import quick_switching

ROOT = Path(__file__).parents[3]


def test_hostile_registers_kill_nobody() -> None:
    ended = subprocess.run(
        [sys.executable, "-m", "tests.unit.board.hostile_registers", "5", "300"],
        cwd=ROOT,
        env=os.environ | {"PYTHONPATH": os.pathsep.join(filter(None, sys.path))},
        capture_output=True,
        timeout=120,
        check=False,
    )
    assert ended.stdout.decode().strip() == "survived", ended.stderr.decode()[-2000:]
    assert ended.returncode == 0


def test_the_gils_interval_is_given_back() -> None:
    usual = sys.getswitchinterval()
    with quick_switching():
        quick = sys.getswitchinterval()
        assert quick < usual
        with quick_switching():
            assert sys.getswitchinterval() == quick
        assert sys.getswitchinterval() == quick
    assert sys.getswitchinterval() == usual
