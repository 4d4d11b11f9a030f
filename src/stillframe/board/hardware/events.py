"""A board's events for its listeners: QEMU's (``qapi/run-state.json``)."""

from __future__ import annotations

import logging
from collections.abc import Callable
from typing import TypeAlias

Listener: TypeAlias = Callable[[str, dict[str, object]], None]
"""Takes an event's name and data. Called with the board lock held, so events come in order; it must
not wait for anything, least of all for the board."""

logger = logging.getLogger(__name__)


class Events:
    """Passes events on to listeners. Guarded by the board lock."""

    def __init__(self) -> None:
        self._listeners: tuple[Listener, ...] = ()

    def add(self, listener: Listener) -> None:
        self._listeners = (*self._listeners, listener)

    def remove(self, listener: Listener) -> None:
        """Remove a listener; do nothing if it is not there."""
        self._listeners = tuple(other for other in self._listeners if other != listener)

    def tell(self, name: str, **data: object) -> None:
        for listener in self._listeners:
            try:
                listener(name, dict(data))
            except Exception:  # a listener must not keep the board from stopping
                logger.exception("a listener failed on %s", name)
