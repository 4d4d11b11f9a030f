"""Progress on standard error: a bar on a terminal, plain lines otherwise."""

from __future__ import annotations

import sys
import time
from typing import Protocol

from stillframe.cli.output import say
from stillframe.cli.quantities import format_bytes, format_seconds
from stillframe.cli.text import is_capable

_EVERY_S = 5.0
_TOO_EARLY_S = 1.0
"""The rate in the first moment does not predict the time left."""


class Progress(Protocol):
    """A display of progress. All calls come from one thread."""

    animated: bool
    """Whether drawing costs enough to lengthen a downtime."""

    def show(
        self, phase: str, done_bytes: int = 0, total_bytes: int | None = None, details: str = ""
    ) -> None:
        """Show the current state; may be called often."""

    def close(self) -> None:
        """End the display and remove what was drawn."""


def choose_progress(*, quiet: bool) -> Progress:
    """Choose the kind of display that suits standard error."""
    if quiet:
        return _Silent()
    if sys.stderr.isatty() and is_capable():
        from stillframe.cli.progress_terminal import TerminalProgress

        return TerminalProgress()
    return PlainProgress()


class PlainProgress:
    """A display with one line for each phase, and one every five seconds within it."""

    animated = False

    def __init__(self, every_s: float = _EVERY_S) -> None:
        self._every_s = every_s
        self._phase = ""
        self._last_s = 0.0

    def show(
        self, phase: str, done_bytes: int = 0, total_bytes: int | None = None, details: str = ""
    ) -> None:
        now_s = time.monotonic()
        new = phase != self._phase
        if not new and now_s - self._last_s < self._every_s:
            return
        self._phase, self._last_s = phase, now_s
        parts = [phase] if new else [phase, amount(done_bytes, total_bytes), details]
        say("stillframe: " + ", ".join(part for part in parts if part))

    def close(self) -> None:
        pass


class _Silent:
    animated = False

    def show(
        self, phase: str, done_bytes: int = 0, total_bytes: int | None = None, details: str = ""
    ) -> None:
        pass

    def close(self) -> None:
        pass


class ByteRate:
    """A display of bytes done, with the rate and the time left."""

    def __init__(self, progress: Progress, phase: str) -> None:
        self._progress = progress
        self._phase = phase
        self._began_s = time.monotonic()
        self._last_s = 0.0

    def update(self, done_bytes: int, total_bytes: int | None = None) -> None:
        """Show the number of bytes done; may be called often."""
        now_s = time.monotonic()
        if now_s - self._last_s < 0.1:
            return
        self._last_s = now_s
        elapsed_s = max(1e-6, now_s - self._began_s)
        rate = done_bytes / elapsed_s
        details = f"{format_bytes(rate)}/s"
        if total_bytes and rate > 0 and elapsed_s > _TOO_EARLY_S:
            details += f", {format_seconds(max(0, total_bytes - done_bytes) / rate)} left"
        self._progress.show(self._phase, done_bytes, total_bytes, details)


def amount(done_bytes: int, total_bytes: int | None) -> str:
    """Return the progress in words."""
    if not total_bytes:
        return format_bytes(done_bytes)
    percent = min(100, 100 * done_bytes // total_bytes)
    return f"{percent} % ({format_bytes(done_bytes)} of {format_bytes(total_bytes)})"
