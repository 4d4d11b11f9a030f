"""Ctrl-C while the program is still being loaded: it ends at once, and shows no traceback."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from pathlib import Path

import stillframe

_SLOW_MODULE = """
import os, time
os.write(1, b"loading")
time.sleep(30)
"""


def test_ctrl_c_while_modules_are_loaded(tmp_path: Path) -> None:
    (tmp_path / "click.py").write_text(_SLOW_MODULE)
    source = str(Path(stillframe.__file__).parents[1])
    environment = os.environ | {"PYTHONPATH": f"{tmp_path}{os.pathsep}{source}"}
    with subprocess.Popen(
        [sys.executable, "-P", "-m", "stillframe", "ps"],
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        env=environment,
    ) as process:
        assert process.stdout is not None
        assert process.stdout.read(7) == b"loading"
        process.send_signal(signal.SIGINT)
        _, err = process.communicate(timeout=10)
    assert process.returncode == -signal.SIGINT
    assert err == b""


def test_an_ignored_ctrl_c_stays_ignored() -> None:
    """As in a job that a shell put into the background."""
    code = "import signal, stillframe.__main__ as m; m.main(); print(signal.getsignal(2))"
    done = subprocess.run(
        [sys.executable, "-c", code, "--version"],
        capture_output=True,
        text=True,
        timeout=30,
        check=True,
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_IGN),
    )
    assert done.stdout.splitlines()[-1] == str(signal.SIG_IGN)
