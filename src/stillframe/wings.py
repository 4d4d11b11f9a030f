"""Wings: parts of the house that may be missing, and that no other room imports.

A wing's package has a module ``door`` with a ``WING``. Rooms ask here for what wings add to them,
by the hook's name:

``machine``  a ``machine.finding.MachineKind``: VMs of another kind, found and connected to
``still``    a ``still.skeleton.SavedKind``: what is to be known of the saved state of such VMs
``restore``  a ``restore.planners.Planner``: how such a VM is started from a snapshot
``doctor``   a ``doctor.host.KindChecks``: what the host must have for such VMs
"""

from __future__ import annotations

import importlib
from collections.abc import Mapping
from typing import Any, NamedTuple

_NAMES = ("stillframe.board",)


class Wing(NamedTuple):
    """What one wing adds. Everything is imported when it is needed.

    ``commands``: names on the command line, and the module that has each. ``hooks``: hook names,
    and ``module:attribute``.
    """

    commands: Mapping[str, str]
    hooks: Mapping[str, str]


def wings() -> list[Wing]:
    """The wings that are installed."""
    found = []
    for name in _NAMES:
        try:
            found.append(importlib.import_module(f"{name}.door").WING)
        except ModuleNotFoundError as error:
            if error.name not in (name, f"{name}.door"):
                raise
    return found


def commands() -> dict[str, str]:
    """The commands of all wings, each with its module."""
    return {name: module for wing in wings() for name, module in wing.commands.items()}


def hooks(name: str) -> list[Any]:
    """What the wings have for a hook."""
    places = (wing.hooks[name].partition(":") for wing in wings() if name in wing.hooks)
    return [getattr(importlib.import_module(module), attribute) for module, _, attribute in places]
