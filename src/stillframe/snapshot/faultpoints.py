"""Named fault points, enabled by ``STILLFRAME_FAULT=point[:n][=action]``.

At the ``n``-th time (default 1) that ``point`` is reached, ``action`` happens: ``raise``
(default) raises an InternalError, ``kill`` sends this process SIGKILL, ``hang`` sleeps for a
minute. The tests drive every point; see ``POINTS``, ``STORE_POINTS``, ``WATCH_POINTS``,
``HUMAN_POINTS``, ``LIVE_POINTS``.
"""

from __future__ import annotations

import os
import signal
import time

from stillframe.errors import InternalError

POINTS = (
    "locked",
    "guarded",
    "attached",
    "registered",
    "armed",
    "stopped",
    "devices",
    "disks",
    "protected",
    "continued",
    "first-batch",
    "swept",
    "unprotected",
    "copied",
    "manifest",
)

STORE_POINTS = ("durable", "entered")
"""Reached only in a take into a store, at its end."""

WATCH_POINTS = ("rearmed",)
"""Reached only under watch, instead of ``unprotected``."""

HUMAN_POINTS = ("handed-over", "migrating", "saved")
"""Reached when QEMU saves the VM (``snapshot.by_migration``), instead of all others except
``guarded``."""

LIVE_POINTS = ("sent", "switched-over")
"""Reached only in live migration (``stillframe.board.migration``), besides most of the others."""

_seen: dict[str, int] = {}


def reach(point: str) -> None:
    """Do nothing unless this point is enabled."""
    wanted = os.environ.get("STILLFRAME_FAULT")
    if not wanted:
        return
    place, _, action = wanted.partition("=")
    name, _, count = place.partition(":")
    if name != point:
        return
    _seen[point] = _seen.get(point, 0) + 1
    if _seen[point] != int(count or "1"):
        return
    if action == "kill":
        os.kill(os.getpid(), signal.SIGKILL)
    elif action == "hang":
        time.sleep(60)
    else:
        raise InternalError(f"fault point '{point}' was reached", guest_state="running")
