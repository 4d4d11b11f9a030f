"""A watch's background work on its store; it pauses while a snapshot is taken."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager

from stillframe.errors import HostError, StillframeError
from stillframe.store.store import Compaction

Compact = Callable[[Callable[[], bool]], Compaction]
"""Compacts chains; calls its argument repeatedly to learn whether to stop."""


class Housekeeping:
    """Compactions in a background thread, one at a time. For use by one thread."""

    def __init__(self, compact: Compact) -> None:
        self._compact = compact
        self._stop = threading.Event()
        self._idle = threading.Event()
        self._idle.set()
        self._lock = threading.Lock()
        self._is_due = self._is_running = False
        self._thread: threading.Thread | None = None
        self._errors: list[StillframeError] = []

    def begin(self) -> None:
        """Start a compaction; if one is running, run another one after it."""
        with self._lock:
            self._is_due = True
            if not self._is_running:
                self._is_running = True
                self._thread = threading.Thread(target=self._work, name="compaction", daemon=True)
                self._thread.start()

    @contextmanager
    def standing_still(self) -> Iterator[None]:
        """Pause the compaction at its next step, so that it takes no CPU from a snapshot."""
        self._idle.clear()
        try:
            yield
        finally:
            self._idle.set()

    def errors(self) -> list[StillframeError]:
        """Return the failures since the previous call."""
        with self._lock:
            found, self._errors = self._errors, []
        return found

    def end(self, *, give_up: bool) -> None:
        """Wait for the compaction to finish; with ``give_up``, make it stop soon."""
        if give_up:
            self._stop.set()
        if self._thread is not None:
            self._thread.join()

    def _stopped(self) -> bool:
        self._idle.wait()
        return self._stop.is_set()

    def _work(self) -> None:
        while True:
            with self._lock:
                if not self._is_due or self._stop.is_set():
                    self._is_running = False
                    return
                self._is_due = False
            self._compact_once()

    def _compact_once(self) -> None:
        try:
            done = self._compact(self._stopped)
        except StillframeError as error:
            with self._lock:
                self._errors.append(error)
            return
        with self._lock:
            self._errors += [
                HostError(f"cannot compact snapshot {one[:8]}", why=why)
                for one, why in done.failed.items()
            ]
