"""Background snapshots of running virtual machines.

The public functions are those of :mod:`stillframe.api`; they are loaded when first used, so
that ``import stillframe`` costs next to nothing.
"""

from __future__ import annotations

import importlib
import sys
from types import ModuleType

from stillframe.version import __version__

# Not from typing, which takes longer to import than everything else here; type checkers know it.
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
    """This package, with its functions as attributes.

    Two functions are called like rooms below this package. The import system binds a room as an
    attribute when it is imported; here the function keeps the name, and the room is still
    found by ``import`` (which looks in ``sys.modules``).
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
