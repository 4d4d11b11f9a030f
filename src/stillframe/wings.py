"""Wings: optional packages that no room imports directly.

A wing's package has a module ``door`` with a ``WING``. Rooms look up here what wings add to them,
by hook name:

``machine``  a ``machine.finding.MachineKind``: finds and connects to VMs of another kind
``still``    a ``still.skeleton.SavedKind``: describes the saved state of such VMs
``restore``  a ``restore.planners.Planner``: plans how to start such a VM from a snapshot
``doctor``   a ``doctor.host.KindChecks``: checks what the host must have for such VMs
"""

from __future__ import annotations

import importlib
from collections.abc import Mapping
from typing import Any, NamedTuple

_NAMES = ("stillframe.board",)


class Wing(NamedTuple):
    """The additions of one wing, each imported when it is used.

    ``commands``: names on the command line, each with its module. ``hooks``: hook names, each with
    a ``module:attribute``.
    """

    commands: Mapping[str, str]
    hooks: Mapping[str, str]


def wings() -> list[Wing]:
    """Return the installed wings."""
    found = []
    for name in _NAMES:
        try:
            found.append(importlib.import_module(f"{name}.door").WING)
        except ModuleNotFoundError as error:
            if error.name not in (name, f"{name}.door"):
                raise
    return found


def commands() -> dict[str, str]:
    """Return the commands of all wings, each with its module."""
    return {name: module for wing in wings() for name, module in wing.commands.items()}


def hooks(name: str) -> list[Any]:
    """Import and return what the wings provide for a hook."""
    places = (wing.hooks[name].partition(":") for wing in wings() if name in wing.hooks)
    return [getattr(importlib.import_module(module), attribute) for module, _, attribute in places]
