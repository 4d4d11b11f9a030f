"""Ctrl-C and SIGTERM: a request to cancel while a job runs; otherwise one exception, only once."""

from __future__ import annotations

import signal
from collections.abc import Callable
from types import FrameType
from typing import Any

_ENDING = (signal.SIGINT, signal.SIGTERM)
_SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)
_IGNORED = (signal.SIGTSTP, signal.SIGTTIN, signal.SIGTTOU)
"""Ctrl-Z would stop our fault thread, too, and so the guest at its next write."""


class CancelRequests:
    """A context manager that counts the signals that ask the program to end.

    A signal that was ignored when the program started (nohup, a background job) stays ignored.
    """

    def __init__(self, on_request: Callable[[], object] = lambda: None) -> None:
        self.count = 0
        self._on_request = on_request
        self._before: dict[signal.Signals, Any] = {}

    def __enter__(self) -> CancelRequests:
        for number in _SIGNALS:
            before = signal.getsignal(number)
            if before is not signal.SIG_IGN:
                self._before[number] = before
                signal.signal(number, self._note)
        for number in _IGNORED:
            self._before[number] = signal.signal(number, signal.SIG_IGN)
        return self

    def _note(self, number: int, frame: FrameType | None) -> None:
        self.count += 1
        self._on_request()

    def __exit__(self, *_error: object) -> None:
        for number, before in self._before.items():
            signal.signal(number, before)


class OneInterrupt:
    """A context manager that lets one Ctrl-C or SIGTERM interrupt the work. All later ones are
    ignored until the program ends: they would interrupt the cleanup and leave orphaned VMs.
    """

    def __init__(self) -> None:
        self._before: dict[signal.Signals, Any] = {}
        self._came = False

    def __enter__(self) -> OneInterrupt:
        for number in _ENDING:
            before = signal.getsignal(number)
            if before is not signal.SIG_IGN:
                self._before[number] = before
                signal.signal(number, self._interrupt)
        return self

    def _interrupt(self, number: int, frame: FrameType | None) -> None:
        self._came = True
        ignore_interrupts()
        raise KeyboardInterrupt

    def __exit__(self, *_error: object) -> None:
        if not self._came:
            for number, before in self._before.items():
                signal.signal(number, before)


def ignore_interrupts() -> None:
    """Ignore them until the program ends, which only has one line left to print."""
    for number in _ENDING:
        signal.signal(number, signal.SIG_IGN)
