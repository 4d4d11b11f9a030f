"""Wait for the unix sockets of what the tests start.

A socket has a path from ``bind`` on, and refuses whoever connects before ``listen``: that the path
exists is not enough.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from pathlib import Path

_LISTENS = 0x10000  # __SO_ACCEPTCON


def wait_listening(
    path: Path | str, timeout_s: float = 60.0, alive: Callable[[], bool] = lambda: True
) -> None:
    """Return when a socket listens at ``path``, bound by its absolute or its relative name.

    Raises:
        RuntimeError: it did not in time, or ``alive`` says that nobody will.
    """
    deadline_s = time.monotonic() + timeout_s
    while not _listens(str(path)):
        if not alive() or time.monotonic() > deadline_s:
            raise RuntimeError(f"nobody listens on {path}")
        time.sleep(0.01)


def _listens(path: str) -> bool:
    for line in Path("/proc/net/unix").read_text(errors="surrogateescape").splitlines()[1:]:
        fields = line.split(None, 7)
        if len(fields) == 8 and int(fields[3], 16) & _LISTENS:
            name = fields[7].removeprefix("./")
            if name == path or (name[0] != "/" and path.endswith(f"/{name}")):
                return True
    return False
