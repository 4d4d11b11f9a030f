"""A place for files that nobody wants afterwards."""

from __future__ import annotations

import os
import secrets
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from stillframe.restore.owned import make_owned, remove, sweep


@contextmanager
def work_directory(purpose: str) -> Iterator[Path]:
    """A private directory among the temporary files, for as long as the context; what a killed
    process left for the same purpose is removed.

    Raises:
        HostError: it cannot be made.
    """
    root, prefix = Path(tempfile.gettempdir()), f"stillframe-{purpose}-"
    sweep(root, prefix)
    directory = root / f"{prefix}{secrets.token_hex(4)}"
    lock_fd = make_owned(directory)
    try:
        yield directory
    finally:
        remove(directory)
        os.close(lock_fd)
