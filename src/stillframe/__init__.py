"""Background snapshots of running virtual machines.

The public functions live in :mod:`stillframe.api`, which is loaded on first use, so that
``import stillframe`` costs next to nothing.
"""

from __future__ import annotations

import importlib
import sys
from types import ModuleType

from stillframe.version import __version__

# Not from typing: importing that takes longer than everything else here. Type checkers know it.
TYPE_CHECKING = False
if TYPE_CHECKING:
    from typing import Any

    from stillframe import errors
    from stillframe.api import (
        connect,
        doctor,
        export,
        fork,
        import_stream,
        list_vms,
        open,  # noqa: A004 - stillframe.open, as gzip.open
        restore,
        take,
        verify,
    )

__all__ = [
    "__version__",
    "connect",
    "doctor",
    "errors",
    "export",
    "fork",
    "import_stream",
    "list_vms",
    "open",
    "restore",
    "take",
    "verify",
]

_MODULES = ("errors",)
_ALSO_ROOMS = ("doctor", "restore")


class _Package(ModuleType):
    """The package's module type: the public functions are its attributes, loaded on first use.

    ``doctor`` and ``restore`` are both functions and rooms. The import system binds a room as an
    attribute of the package; this class drops that binding, so the function keeps the name.
    ``import`` still finds the room, in ``sys.modules``.
    """

    def __getattr__(self, name: str) -> Any:
        if name in _MODULES:
            return importlib.import_module(f"{__name__}.{name}")
        if name in __all__:
            return getattr(importlib.import_module(f"{__name__}.api"), name)
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")

    def __setattr__(self, name: str, value: object) -> None:
        if name not in _ALSO_ROOMS:
            super().__setattr__(name, value)

    def __dir__(self) -> list[str]:
        return sorted({*super().__dir__(), *__all__})


sys.modules[__name__].__class__ = _Package
