"""Swap space of a test's own."""

from __future__ import annotations

import ctypes
import os
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

_PROCESS_MADVISE = 440
_PAGEOUT = 21


@contextmanager
def swap_space(directory: Path, mib: int) -> Iterator[None]:
    """The host swaps to a file inside; skips the test where it may not. Needs root."""
    file = directory / "swap"
    with file.open("wb") as opened:
        os.posix_fallocate(opened.fileno(), 0, mib << 20)
    file.chmod(0o600)
    subprocess.run(["/sbin/mkswap", "-q", str(file)], check=True, capture_output=True)
    on = subprocess.run(["/sbin/swapon", str(file)], capture_output=True, text=True, check=False)
    if on.returncode:
        file.unlink()
        pytest.skip(f"missing swap: {on.stderr.strip()}")
    try:
        yield
    finally:
        subprocess.run(["/sbin/swapoff", str(file)], check=True)
        file.unlink()


def swap_out(pid: int, hva: int, length_bytes: int) -> None:
    """Have memory of a process reclaimed, as far as it goes, also what it uses all the time."""
    pidfd = os.pidfd_open(pid)
    try:
        run = (ctypes.c_uint64 * 2)(hva, length_bytes)
        done = ctypes.CDLL(None, use_errno=True).syscall(
            ctypes.c_long(_PROCESS_MADVISE), pidfd, run, 1, _PAGEOUT, 0
        )
        assert done >= 0, os.strerror(ctypes.get_errno())
    finally:
        os.close(pidfd)
