"""The board: our own VM, a wing of the house that the other rooms do without.

Its public functions are those of :mod:`stillframe.board.api`, loaded when first used: listing the
commands must not wait for them.
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
