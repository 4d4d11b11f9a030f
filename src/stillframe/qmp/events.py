"""QMP events and their subscribers."""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Callable, Mapping

import msgspec

logger = logging.getLogger(__name__)


class QmpEvent(msgspec.Struct, frozen=True, kw_only=True):
    """One event (QEMU ``docs/interop/qmp-spec.rst``).

    ``timestamp_s``: the VMM's wall clock when it happened, seconds since 1970.
    ``received_s``: our monotonic clock (``time.monotonic``) when it arrived.
    """

    name: str
    data: Mapping[str, object]
    timestamp_s: float
    received_s: float


class EventSubscribers:
    """The subscribers to a client's events; subscribe from any thread."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._subscribers: list[Callable[[QmpEvent], None]] = []

    def note(self, message: Mapping[str, object]) -> None:
        """Parse an event message and notify the subscribers."""
        event = _event_of(message)
        with self._lock:
            subscribers = tuple(self._subscribers)
        for subscriber in subscribers:
            try:
                subscriber(event)
            except Exception:
                # A failing subscriber must not end the connection.
                logger.exception("a subscriber failed at event %s", event.name)

    def subscribe(self, callback: Callable[[QmpEvent], None]) -> Callable[[], None]:
        """Call ``callback`` for each event from now on; return a function that unsubscribes."""
        with self._lock:
            self._subscribers.append(callback)

        def unsubscribe() -> None:
            with self._lock:
                if callback in self._subscribers:
                    self._subscribers.remove(callback)

        return unsubscribe


def _event_of(message: Mapping[str, object]) -> QmpEvent:
    data = message.get("data")
    stamp = message.get("timestamp")
    timestamp_s = 0.0
    if isinstance(stamp, Mapping):
        seconds, micros = stamp.get("seconds"), stamp.get("microseconds")
        if isinstance(seconds, int) and isinstance(micros, int) and seconds >= 0:
            timestamp_s = seconds + micros / 1e6
    return QmpEvent(
        name=str(message.get("event")),
        data=dict(data) if isinstance(data, Mapping) else {},
        timestamp_s=timestamp_s,
        received_s=time.monotonic(),
    )
