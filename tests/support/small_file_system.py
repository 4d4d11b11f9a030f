"""A file system in memory, mounted for a test."""

from __future__ import annotations

import subprocess
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest


@contextmanager
def mounted_tmpfs(place: Path, *options: str) -> Iterator[Path]:
    """At ``place``, which is made; ``options`` as tmpfs(5) has them, such as ``size=4m``."""
    place.mkdir()
    words = ["-o", ",".join(options), "stillframe-test", str(place)]
    done = subprocess.run(["mount", "-t", "tmpfs", *words], capture_output=True, check=False)
    if done.returncode:
        pytest.skip(f"missing mount: {done.stderr.decode().strip()}")
    try:
        yield place
    finally:
        subprocess.run(["umount", "-l", str(place)], check=True)
