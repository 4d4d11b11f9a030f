"""Runs several pieces of work call by call, in an order that the test chooses."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator

_LONG_S = 60.0


class Turns:
    """Each worker stops before each of its calls, and goes on when it is its turn."""

    def __init__(self) -> None:
        self._lock = threading.Condition()
        self._turn: int | None = None
        self._waiting: set[int] = set()
        self._running: set[int] = set()
        self._errors: list[BaseException] = []

    def at_call(self, number: int) -> Callable[[str], None]:
        """For a backend of worker ``number``."""

        def wait(_call: str) -> None:
            with self._lock:
                self._waiting.add(number)
                self._lock.notify_all()
                assert self._lock.wait_for(lambda: self._turn == number, _LONG_S)
                self._turn = None
                self._waiting.discard(number)

        return wait

    def run(
        self, works: list[Callable[[], None]], order: Iterator[int], look: Callable[[], object]
    ) -> None:
        """Run them to their ends.

        Args:
            order: numbers, of which each chooses who goes on next; then it is by turns.
            look: called between any two calls.
        """
        self._running = set(range(len(works)))
        threads = [
            threading.Thread(target=self._work, args=(number, work), daemon=True)
            for number, work in enumerate(works)
        ]
        for thread in threads:
            thread.start()
        step = 0
        while True:
            with self._lock:
                assert self._lock.wait_for(lambda: self._waiting == self._running, _LONG_S)
                if not self._running:
                    break
                look()
                ready = sorted(self._running)
                step += 1
                self._turn = ready[next(order, step) % len(ready)]
                chosen = self._turn
                self._waiting.discard(chosen)
                self._lock.notify_all()
        for thread in threads:
            thread.join(_LONG_S)
        if self._errors:
            raise self._errors[0]

    def _work(self, number: int, work: Callable[[], None]) -> None:
        try:
            work()
        except BaseException as error:  # noqa: BLE001 - raised again in run()
            self._errors.append(error)
        finally:
            with self._lock:
                self._running.discard(number)
                self._waiting.discard(number)
                self._lock.notify_all()
