"""A place of its own for a board's monitor, where nobody named one."""

from __future__ import annotations

import contextlib
import re
import secrets
from pathlib import Path

from stillframe.restore.places import make_directory, runtime_root


class PrivateSocket:
    """A directory of mode 0700 for a socket, among those of restored VMs.

    Raises:
        HostError: it cannot be made.
    """

    def __init__(self, name: str) -> None:
        entry = f"{re.sub(r'[^A-Za-z0-9_]', '', name)[:16] or 'board'}-{secrets.token_hex(3)}"
        self._directory = runtime_root() / entry
        make_directory(self._directory)
        self.path = str(self._directory / "qmp.sock")

    def close(self) -> None:
        """Remove it; never raises."""
        with contextlib.suppress(OSError):
            Path(self.path).unlink(missing_ok=True)
            self._directory.rmdir()
