"""The migration capabilities that the board supports, and which of them exclude each other.

Names, defaults and wording are QEMU's (``migration/options.c``: ``migrate_caps_check``).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from types import MappingProxyType

from stillframe.errors import HostError, RefusedError, UsageError

EVENTS = "events"
POSTCOPY_RAM = "postcopy-ram"
RETURN_PATH = "return-path"
BACKGROUND_SNAPSHOT = "background-snapshot"

NAMES = (EVENTS, POSTCOPY_RAM, RETURN_PATH, BACKGROUND_SNAPSHOT)
_NOT_WITH_BACKGROUND_SNAPSHOT = (POSTCOPY_RAM, RETURN_PATH)

Probe = Callable[[], None]
"""Tries what a capability needs from the host; raises HostError if the host lacks it."""


class Capabilities:
    """The state of all capabilities, which start off.

    Args:
        probe_write_tracking: checks that this host can write-protect RAM.
        probe_missing_pages: checks that this host can fill RAM on demand.
        waits_for_incoming: returns whether the machine waits for an incoming migration: only a
            destination must be able to fill RAM on demand.
    """

    def __init__(
        self,
        *,
        probe_write_tracking: Probe,
        probe_missing_pages: Probe,
        waits_for_incoming: Callable[[], bool],
    ) -> None:
        self._on = dict.fromkeys(NAMES, False)
        self._probe_write_tracking = probe_write_tracking
        self._probe_missing_pages = probe_missing_pages
        self._waits_for_incoming = waits_for_incoming

    def __getitem__(self, name: str) -> bool:
        return self._on[name]

    def as_dict(self) -> Mapping[str, bool]:
        """Return a live view of all capabilities, which follows later changes."""
        return MappingProxyType(self._on)

    def set(self, wanted: Mapping[str, bool]) -> None:
        """Switch capabilities, all or none.

        Raises:
            UsageError: an unknown capability.
            RefusedError: they exclude each other, or the host does not support one. Nothing
                changed.
        """
        for name in wanted:
            if name not in self._on:
                raise UsageError(f"Parameter 'capability' does not accept value '{name}'")
        new = self._on | dict(wanted)
        if new[POSTCOPY_RAM] and not self._on[POSTCOPY_RAM] and self._waits_for_incoming():
            _try(self._probe_missing_pages, "Postcopy is not supported")
        if new[BACKGROUND_SNAPSHOT]:
            if not self._on[BACKGROUND_SNAPSHOT]:
                _try(
                    self._probe_write_tracking,
                    "Background-snapshot is not supported by host kernel",
                )
            for name in _NOT_WITH_BACKGROUND_SNAPSHOT:
                if new[name]:
                    raise RefusedError(f"Background-snapshot is not compatible with {name}")
        self._on.update(new)


def _try(probe: Probe, what: str) -> None:
    try:
        probe()
    except HostError as error:
        raise RefusedError(what, why=str(error)) from error
