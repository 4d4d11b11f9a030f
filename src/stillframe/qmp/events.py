"""QMP events as they came, bounded, readable from any thread."""

from __future__ import annotations

import logging
import threading
import time
from collections import deque
from collections.abc import Callable, Mapping

import msgspec

logger = logging.getLogger(__name__)

_KEPT = 4096
"""Events kept until somebody drains them; the oldest go first, and that is counted."""


class QmpEvent(msgspec.Struct, frozen=True, kw_only=True):
    """One event (QEMU ``docs/interop/qmp-spec.rst``).

    ``timestamp_s``: the VMM's wall clock when it happened, seconds since 1970.
    ``received_s``: our monotonic clock (``time.monotonic``) when it arrived.
    """

    name: str
    data: Mapping[str, object]
    timestamp_s: float
    received_s: float


class EventLog:
    """A bounded log of events with subscribers."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._log: deque[QmpEvent] = deque(maxlen=_KEPT)
        self._subscribers: list[Callable[[QmpEvent], None]] = []
        self._dropped = 0

    def note(self, message: Mapping[str, object]) -> None:
        """Take one event message of the wire, and tell the subscribers."""
        event = _event_of(message)
        with self._lock:
            if len(self._log) == _KEPT:
                self._dropped += 1
            self._log.append(event)
            subscribers = tuple(self._subscribers)
        for subscriber in subscribers:
            try:
                subscriber(event)
            except Exception:
                # A subscriber's mistake must not end the connection.
                logger.exception("a subscriber failed at event %s", event.name)

    def drain(self) -> list[QmpEvent]:
        """Take out all events, oldest first."""
        with self._lock:
            events = list(self._log)
            self._log.clear()
        return events

    @property
    def dropped(self) -> int:
        """Events lost because nobody drained the log."""
        return self._dropped

    def subscribe(self, callback: Callable[[QmpEvent], None]) -> Callable[[], None]:
        """Call ``callback`` for each event from now on; returns the function that undoes it."""
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
