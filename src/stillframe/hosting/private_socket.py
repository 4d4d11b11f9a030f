"""A place of its own for a board's monitor, where nobody named one."""

from __future__ import annotations

import os
import re
import secrets

from stillframe.restore.owned import make_owned, remove, sweep
from stillframe.restore.places import runtime_root

_SOCKET = "qmp.sock"


class PrivateSocket:
    """A directory of mode 0700 for a socket, among those of restored VMs, that belongs to this
    process.

    Raises:
        HostError: it cannot be made.
    """

    def __init__(self, name: str) -> None:
        entry = f"{re.sub(r'[^A-Za-z0-9_]', '', name)[:16] or 'board'}-{secrets.token_hex(3)}"
        root = runtime_root()
        sweep(root)
        self._directory = root / entry
        self.path = str(self._directory / _SOCKET)
        self._lock_fd = make_owned(self._directory)

    def close(self) -> None:
        """Remove it; never raises."""
        remove(self._directory)
        if self._lock_fd >= 0:
            os.close(self._lock_fd)
            self._lock_fd = -1
