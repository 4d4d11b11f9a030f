"""A thread of the board, which waits for work on the board lock."""

from __future__ import annotations

import threading
from abc import ABC, abstractmethod


class BoardThread(ABC):
    """A thread of the board. Call methods with the board lock held, unless they say otherwise. The
    thread runs ``_loop``, which waits for ``_wake`` and returns once ``_quit`` is set."""

    def __init__(self, name: str, lock: threading.RLock) -> None:
        self._lock = lock
        self._wake = threading.Condition(lock)
        self._quit = False
        self._thread = threading.Thread(target=self._loop, name=f"stillframe-{name}", daemon=True)

    @abstractmethod
    def _loop(self) -> None:
        """Do the thread's work; starts without the board lock."""

    def start_thread(self) -> None:
        self._thread.start()

    def look(self) -> None:
        """Wake the thread to look for work."""
        self._wake.notify()

    def quit(self) -> None:
        """End the thread after the work at hand; ``join`` follows."""
        self._quit = True
        self._wake.notify()

    def join(self) -> None:
        """Wait for the thread to end, without the board lock."""
        if self._thread.ident is not None:
            self._thread.join()
