"""The progress bar. Importing this module imports rich, which is slow."""

from __future__ import annotations

import time
from contextlib import suppress

from rich.console import Console
from rich.progress import BarColumn, Progress, SpinnerColumn, TextColumn
from rich.table import Column

from stillframe.cli.progress import amount
from stillframe.cli.text import printable

_REFRESH_S = 0.1
_PHASE_COLUMNS, _BAR_COLUMNS = 10, 16
_OTHER_COLUMNS = 1 + _BAR_COLUMNS + 3
"""Columns of the spinner, the bar, and the gaps between the parts."""


class TerminalProgress:
    """A bar on standard error, drawn in the caller's thread only, about ten times a second."""

    animated = True

    def __init__(self) -> None:
        self._bar = Progress(
            SpinnerColumn(),
            TextColumn(
                "{task.description}",
                markup=False,
                table_column=Column(no_wrap=True, min_width=_PHASE_COLUMNS),
            ),
            BarColumn(bar_width=_BAR_COLUMNS),
            TextColumn(
                "{task.fields[details]}",
                markup=False,
                table_column=Column(no_wrap=True),
            ),
            console=Console(stderr=True),
            auto_refresh=False,
            transient=True,
        )
        self._task = self._bar.add_task("", total=None, details="")
        self._last_s = 0.0
        self._gone = False
        self._bar.start()

    def show(
        self, phase: str, done_bytes: int = 0, total_bytes: int | None = None, details: str = ""
    ) -> None:
        now_s = time.monotonic()
        if self._gone or now_s - self._last_s < _REFRESH_S:
            return
        self._last_s = now_s
        # Cut the details on a narrow terminal; rich would shrink the spinner and the bar first.
        room = max(0, self._bar.console.width - _OTHER_COLUMNS - max(len(phase), _PHASE_COLUMNS))
        how_far = amount(done_bytes, total_bytes) if done_bytes else ""
        words = printable(", ".join(part for part in (how_far, details) if part))
        self._bar.update(
            self._task,
            description=printable(phase),
            completed=done_bytes,
            total=total_bytes or None,
            details=words if len(words) <= room else f"{words[: max(0, room - 1)]}…",
        )
        try:
            self._bar.refresh()
        except OSError:  # the terminal was closed
            self._gone = True

    def close(self) -> None:
        with suppress(OSError):
            self._bar.stop()
