"""The processes that have an image open, which locks do not show: a clone takes no lock on the
frozen image below its disk, since the forked VM still writes to it when the clone's VMM starts."""

from __future__ import annotations

import contextlib
import os
from pathlib import Path


def users_of(path: str, *, besides: int) -> tuple[int, ...]:
    """Return the processes that have a file open, as far as we can see (proc(5): ``/proc/PID/fd``).

    Args:
        besides: a known user, to leave out.
    """
    try:
        wanted = os.stat(path)  # noqa: PTH116 - any text
    except (OSError, ValueError):
        return ()
    found = []
    for process in Path("/proc").glob("[0-9]*"):
        if int(process.name) == besides:
            continue
        with contextlib.suppress(OSError):
            if any(_is_same(entry, wanted) for entry in (process / "fd").iterdir()):
                found.append(int(process.name))
    return tuple(sorted(found))


def _is_same(entry: Path, wanted: os.stat_result) -> bool:
    try:
        return os.path.samestat(entry.stat(), wanted)
    except OSError:  # closed by now
        return False
