"""A thread of the board, which waits for its turn with the board lock held."""

from __future__ import annotations

import threading
from abc import ABC, abstractmethod


class BoardThread(ABC):
    """Methods are called with the board lock held, unless said. The thread runs ``_loop``, which
    waits for ``_wake`` and returns once ``_quit`` is set."""

    def __init__(self, name: str, lock: threading.RLock) -> None:
        self._lock = lock
        self._wake = threading.Condition(lock)
        self._quit = False
        self._thread = threading.Thread(target=self._loop, name=f"stillframe-{name}", daemon=True)

    @abstractmethod
    def _loop(self) -> None:
        """The thread's work; begins without the board lock."""

    def start_thread(self) -> None:
        self._thread.start()

    def look(self) -> None:
        """There may be something to do."""
        self._wake.notify()

    def quit(self) -> None:
        """End the thread after what is at hand; then ``join``."""
        self._quit = True
        self._wake.notify()

    def join(self) -> None:
        """Wait for the thread's end, without the board lock."""
        if self._thread.ident is not None:
            self._thread.join()
