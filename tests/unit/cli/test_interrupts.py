"""Ctrl-C while the program is still being loaded: it ends at once, and shows no traceback."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from pathlib import Path

import stillframe
from stillframe.cli.cancelling import OneInterrupt

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
        _, err = process.communicate(timeout=60)
    assert process.returncode == -signal.SIGINT
    assert err == b""


def test_an_ignored_ctrl_c_stays_ignored() -> None:
    """As in a job that a shell put into the background."""
    code = "import signal, stillframe.__main__ as m; m.main(); print(signal.getsignal(2))"
    done = subprocess.run(
        [sys.executable, "-c", code, "--version"],
        capture_output=True,
        text=True,
        timeout=120,
        check=True,
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_IGN),
    )
    assert done.stdout.splitlines()[-1] == str(signal.SIG_IGN)


def test_one_ctrl_c_interrupts_and_the_way_back_is_not_interrupted() -> None:
    code = """
import os, signal
from stillframe.cli.cancelling import OneInterrupt
signal.signal(signal.SIGTERM, signal.default_int_handler)
try:
    with OneInterrupt():
        try:
            os.kill(os.getpid(), signal.SIGINT)
            print("not interrupted")
        finally:
            for number in (signal.SIGINT, signal.SIGTERM) * 2:
                os.kill(os.getpid(), number)
            print("way back")
except KeyboardInterrupt:
    os.kill(os.getpid(), signal.SIGTERM)
    print("end")
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120)
    assert (done.returncode, done.stdout, done.stderr) == (0, "way back\nend\n", "")


def test_what_was_not_interrupted_leaves_the_signals_as_they_were() -> None:
    before = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}
    with OneInterrupt():
        assert signal.getsignal(signal.SIGINT) != before[signal.SIGINT]
    assert {number: signal.getsignal(number) for number in before} == before
