"""The thread of a device that does DMA: short pieces of work, and none while the board is stopped.

A piece runs without the board lock. When the board stops, the thread finishes the piece at hand
and what the device must put away (a disk's cache); the rest stays in the device's state.
"""

from __future__ import annotations

import logging
import threading
from collections.abc import Callable
from typing import Protocol, TypeAlias

from stillframe.board.hardware.board_thread import BoardThread
from stillframe.capture.signal_protection import prepare_thread

logger = logging.getLogger(__name__)

Finish: TypeAlias = Callable[[], None]
"""Ends a piece of work, with the board lock held."""
Work: TypeAlias = Callable[[], Finish]
"""Does a piece of work, without the board lock, in well under a millisecond if it can."""


class Worker(Protocol):
    """A device with work for a thread."""

    def next_work(self, *, running: bool) -> Work | None:
        """Return the next piece, or None. Called with the board lock held; the call changes
        nothing, and the piece may touch the device's state only in its ``Finish``.

        Args:
            running: False while the board stops: return only what must be put away.
        """


class DeviceThread(BoardThread):
    """A device's thread. ``quiet``: it does nothing until ``resume``."""

    def __init__(
        self, name: str, lock: threading.RLock, worker: Worker, on_quiet: Callable[[], None]
    ) -> None:
        super().__init__(name, lock)
        self.name = name
        self.quiet = True
        self._worker = worker
        self._on_quiet = on_quiet
        self._running = False
        self._busy = False
        self._dead = False

    def kick(self) -> None:
        """Wake the thread to look for work, if the board runs."""
        if self._running:
            self._wake.notify()

    def resume(self) -> None:
        self._running = True
        self.quiet = self._dead
        self._wake.notify()

    def pause(self) -> None:
        """Become quiet soon, often at once."""
        self._running = False
        if self._busy or self._dead:
            return
        if self._worker.next_work(running=False) is None:
            self.quiet = True
        else:
            self._wake.notify()

    def _loop(self) -> None:
        with self._lock:
            try:
                prepare_thread()
                self._work()
            except Exception:  # a stop must not wait for this thread for ever
                logger.exception("%s has failed; its device does nothing any more", self.name)
                self._dead = self.quiet = True
                self._on_quiet()

    def _work(self) -> None:
        while not self._quit:
            work = self._worker.next_work(running=self._running)
            if work is not None:
                self._do(work)
                continue
            if not self._running and not self.quiet:
                self.quiet = True
                self._on_quiet()
            self._wake.wait()

    def _do(self, work: Work) -> None:
        self._busy = True
        self._lock.release()
        try:
            finish = work()
        finally:
            self._lock.acquire()
            self._busy = False
        finish()
