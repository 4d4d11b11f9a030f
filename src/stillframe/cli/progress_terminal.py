"""The progress bar. Importing this imports rich, which takes a while."""

from __future__ import annotations

import time
from contextlib import suppress

from rich.console import Console
from rich.progress import BarColumn, Progress, SpinnerColumn, TextColumn
from rich.table import Column

from stillframe.cli.progress import amount
from stillframe.cli.text import printable

_REFRESH_S = 0.1


class TerminalProgress:
    """A bar on standard error; drawn by the caller's thread only, about ten times a second."""

    animated = True

    def __init__(self) -> None:
        self._bar = Progress(
            SpinnerColumn(),
            # On a narrow terminal the details are cut, and the phase never.
            TextColumn(
                "{task.description}", markup=False, table_column=Column(no_wrap=True, min_width=10)
            ),
            BarColumn(bar_width=16),
            TextColumn(
                "{task.fields[details]}",
                markup=False,
                table_column=Column(no_wrap=True, ratio=1, overflow="ellipsis"),
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
        how_far = amount(done_bytes, total_bytes) if done_bytes else ""
        self._bar.update(
            self._task,
            description=printable(phase),
            completed=done_bytes,
            total=total_bytes or None,
            details=printable(", ".join(part for part in (how_far, details) if part)),
        )
        try:
            self._bar.refresh()
        except OSError:  # the terminal was closed
            self._gone = True

    def close(self) -> None:
        with suppress(OSError):
            self._bar.stop()
