"""Runs the program ``stillframe``, on pipes and on a terminal."""

from __future__ import annotations

import os
import pty
import re
import select
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import IO

COLOUR = re.compile(rb"\x1b\[[0-9;]*m")
PROGRAM = (sys.executable, "-m", "stillframe")
SLOW = ("--max-bandwidth", "1M")
"""The snapshot of the guest below then takes half a minute."""


def run(
    *words: object,
    content: bytes | None = None,
    stdin: int | IO[bytes] = subprocess.DEVNULL,
    stdout: int | IO[bytes] = subprocess.PIPE,
    env: dict[str, str] | None = None,
    limit: Callable[[], None] | None = None,
) -> subprocess.CompletedProcess[bytes]:
    """Run stillframe to its end.

    Args:
        content: for standard input. limit: called in the new process.
    """
    with subprocess.Popen(
        [*PROGRAM, *map(str, words)],
        stdin=stdin if content is None else subprocess.PIPE,
        stdout=stdout,
        stderr=subprocess.PIPE,
        env=env,
        preexec_fn=limit,
    ) as process:
        try:
            out, err = process.communicate(content, timeout=120)
        finally:
            process.kill()
    return subprocess.CompletedProcess(process.args, process.returncode, out, err)


def start(*words: object) -> subprocess.Popen[bytes]:
    """Start stillframe on pipes."""
    return subprocess.Popen(
        [*PROGRAM, *map(str, words)],
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        bufsize=0,  # so that select tells of every line
    )


def on_terminal(
    *words: object, environment: dict[str, str] | None = None
) -> tuple[int, bytes, bytes]:
    """Run stillframe with standard error on a terminal: (exit code, stdout, stderr)."""
    ours, theirs = pty.openpty()
    env = {name: value for name, value in os.environ.items() if name != "NO_COLOR"}
    env |= {"TERM": "xterm-256color", "COLUMNS": "120"} | (environment or {})
    process = subprocess.Popen(
        [*PROGRAM, *map(str, words)],
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=theirs,
        env=env,
    )
    os.close(theirs)
    seen = _read_terminal(ours)
    out, _ = process.communicate(timeout=60)
    os.close(ours)
    return process.returncode, out, seen


def answered(question: bytes, answer: bytes, *words: object) -> tuple[int, bytes, bytes]:
    """Run stillframe on a terminal, and answer its question: (exit code, stdout, stderr)."""
    ours, theirs = pty.openpty()
    process = subprocess.Popen(
        [*PROGRAM, *map(str, words)],
        stdin=theirs,
        stdout=subprocess.PIPE,
        stderr=theirs,
        env=os.environ | {"TERM": "dumb"},
    )
    os.close(theirs)
    asked = b""
    while question not in asked:
        part = os.read(ours, 65536)
        assert part, asked
        asked += part
    os.write(ours, answer)
    seen = _read_terminal(ours)
    out, _ = process.communicate(timeout=60)
    os.close(ours)
    return process.returncode, out, asked + seen


def _read_terminal(fd: int) -> bytes:
    seen = b""
    deadline = time.monotonic() + 120
    while time.monotonic() < deadline:
        if select.select([fd], [], [], 1.0)[0]:
            try:
                part = os.read(fd, 65536)
            except OSError:  # EIO: the other side is closed
                return seen
            if not part:
                return seen
            seen += part
    raise AssertionError(f"the program did not end: {seen!r}")


def left_in(directory: Path) -> list[str]:
    return sorted(entry.name for entry in directory.iterdir())


def wait_for(process: subprocess.Popen[bytes], words: bytes) -> None:
    assert process.stderr is not None
    seen = b""
    deadline = time.monotonic() + 60
    while time.monotonic() < deadline:
        if select.select([process.stderr], [], [], 1.0)[0]:
            line = process.stderr.readline()
            seen += line
            if words in line:
                return
            assert line, f"it ended before {words!r}: {seen!r}"
    raise AssertionError(f"no {words!r} in time")
