"""The board: our own VM, a wing of the house that no other room depends on.

Its public functions live in :mod:`stillframe.board.api`, which loads on first use, so that listing
the commands stays fast.
"""

from __future__ import annotations

import importlib

TYPE_CHECKING = False
if TYPE_CHECKING:
    from stillframe.board.api import GUESTS, RunningBoard, build_guest, check, start

__all__ = ["GUESTS", "RunningBoard", "build_guest", "check", "start"]


def __getattr__(name: str) -> object:
    if name in __all__:
        return getattr(importlib.import_module("stillframe.board.api"), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
