"""A small file system that shares blocks between files, mounted from an image of its own."""

from __future__ import annotations

import os
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

_BYTES = 512 << 20


@contextmanager
def reflink_place(kind: str, directory: Path) -> Iterator[Path]:
    """Its root. ``kind``: ``xfs`` or ``btrfs``."""
    image, place = directory / "file-system", directory / "mounted"
    with image.open("wb") as file:
        file.truncate(_BYTES)
    place.mkdir()
    for words in ([f"mkfs.{kind}", "-q", str(image)], ["mount", str(image), str(place)]):
        try:
            subprocess.run(words, capture_output=True, check=True)
        except (OSError, subprocess.CalledProcessError) as error:
            pytest.skip(f"missing {kind}: {words[0]}: {getattr(error, 'stderr', error)!r}")
    try:
        yield place
    finally:
        subprocess.run(["umount", "-l", str(place)], check=False)
        image.unlink()


def shares_blocks(path: Path) -> bool:
    """Whether another file has blocks of this one (filefrag(8): FIEMAP_EXTENT_SHARED)."""
    done = subprocess.run(["filefrag", "-v", path], capture_output=True, text=True, check=True)
    return "shared" in done.stdout


def fill(place: Path, leave_bytes: int) -> None:
    """Leave no more room than that."""
    status = os.statvfs(place)
    with (place / "ballast").open("wb") as ballast:
        os.posix_fallocate(ballast.fileno(), 0, status.f_bavail * status.f_frsize - leave_bytes)
