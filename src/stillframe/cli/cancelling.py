"""Ctrl-C and SIGTERM while a job is under way: a request to cancel, not an exception."""

from __future__ import annotations

import signal
from types import FrameType, TracebackType
from typing import Any

_SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)
_IGNORED = (signal.SIGTSTP, signal.SIGTTIN, signal.SIGTTOU)
"""Ctrl-Z would stop the fault thread with us, and the guest at its next write."""


class CancelRequests:
    """Counts the signals that ask for an end, as a context manager.

    A signal that was ignored when the program started (nohup, a background job) stays ignored.
    """

    def __init__(self) -> None:
        self.count = 0
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

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        for number, before in self._before.items():
            signal.signal(number, before)
