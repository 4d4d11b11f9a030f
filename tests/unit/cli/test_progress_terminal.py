"""The bar on a terminal: what is cut where there is no room."""

from __future__ import annotations

import io
import re

import pytest
from rich.console import Console

from stillframe.cli import progress_terminal
from stillframe.cli.progress_terminal import TerminalProgress

DETAILS = "about 1 min 5 s left, writing 200 MiB/s, 12345 faults, spill 3.0 MiB of 256 MiB"


@pytest.mark.parametrize(("columns", "cut"), [(140, False), (100, True), (80, True)])
def test_bar_and_time_left_are_shown(
    columns: int, cut: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("NO_COLOR", raising=False)  # without colours only what is done is drawn
    terminal = io.StringIO()
    console = Console(file=terminal, force_terminal=True, width=columns, legacy_windows=False)
    monkeypatch.setattr(progress_terminal, "Console", lambda stderr: console)
    bar = TerminalProgress()
    bar.show("saving", 1 << 30, 4 << 30, DETAILS)
    bar.close()
    drawn = re.sub(r"\x1b\[[0-9;?]*[a-zA-Z]", "", terminal.getvalue())
    line = next(part for part in re.split(r"[\r\n]", drawn) if "saving" in part)
    assert len(re.findall("[━╺╸]", line)) == 16
    assert "25 % (1.0 GiB of 4.0 GiB), about 1 min 5 s left, " in line
    assert line.rstrip().endswith("…") == cut
    assert len(line) <= columns
