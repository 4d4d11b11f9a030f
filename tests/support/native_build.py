"""Compile the C programs of ``tests/native`` and ``bench``, once a run."""

from __future__ import annotations

import atexit
import os
import shutil
import subprocess
import tempfile
from functools import cache
from pathlib import Path

import pytest

_PREFIX = "stillframe-native-"
ROOT = Path(__file__).resolve().parents[2]


@cache
def _build_directory() -> Path:
    # Runs that were killed leave theirs behind.
    for left in Path(tempfile.gettempdir()).glob(f"{_PREFIX}*-*"):
        pid = left.name.removeprefix(_PREFIX).partition("-")[0]
        if not Path("/proc", pid).exists():
            shutil.rmtree(left, ignore_errors=True)
    path = Path(tempfile.mkdtemp(prefix=f"{_PREFIX}{os.getpid()}-"))
    # Some tests run a program as another user.
    path.chmod(0o755)
    atexit.register(shutil.rmtree, path, ignore_errors=True)
    return path


@cache
def build(source: str, *flags: str) -> Path:
    """The program of ``source`` (a path below the checkout)."""
    compiler = shutil.which("cc") or shutil.which("gcc")
    if compiler is None:
        pytest.skip("missing compiler: no cc or gcc")
    path = ROOT / source
    program = _build_directory() / "-".join([path.stem, *(flag.strip("-") for flag in flags)])
    done = subprocess.run(
        [compiler, "-O2", "-pthread", "-Wall", "-o", str(program), str(path), *flags],
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )
    if done.returncode:
        pytest.fail(f"{source} does not compile: {done.stderr}")
    return program
