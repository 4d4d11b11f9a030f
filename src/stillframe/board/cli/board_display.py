"""Displays for a running board's picture: none, a file, or the terminal."""

from __future__ import annotations

import os
import select
import shutil
import sys
import time
from contextlib import suppress
from typing import TYPE_CHECKING

from stillframe.board.cli.half_blocks import Picture, picture_lines
from stillframe.cli.output import say
from stillframe.cli.text import is_capable, wants_colour
from stillframe.errors import StillframeError, UsageError

if TYPE_CHECKING:
    from stillframe.board import RunningBoard

_EVERY_S = 0.5
_TEXT_ROWS = 6
"""Terminal lines left to the guest's serial line, at least."""


class Display:
    """Shows a board's picture; this base class does not. All calls come from one thread."""

    def refresh(self, board: RunningBoard, *, now: bool) -> None:
        """Update the picture; may be called often. ``now``: the user asked for it."""

    def close(self, board: RunningBoard) -> None:
        """Finish, as the board is about to end. Never raises."""


def choose_display(display: str | None, *, serial: str) -> Display:
    """Return the display that ``--display`` names.

    Raises:
        UsageError: it names the terminal, and standard output is not a capable one.
    """
    if display is None:
        return Display()
    if display != "terminal":
        return _FileDisplay(display)
    if not sys.stdout.isatty() or not is_capable():
        raise UsageError(
            "--display terminal: standard output is no terminal that can do it",
            remedy="name a .png file",
        )
    return _TerminalDisplay(with_text=serial == "stdio")


class _FileDisplay(Display):
    """Writes the picture at the end and on request, complete or not at all."""

    def __init__(self, path: str) -> None:
        self._path = path

    def refresh(self, board: RunningBoard, *, now: bool) -> None:
        if now:
            self._write(board)

    def close(self, board: RunningBoard) -> None:
        self._write(board)

    def _write(self, board: RunningBoard) -> None:
        try:
            board.save_picture(self._path)
        except StillframeError as error:
            say(f"stillframe: {error}")  # the guest goes on


class _TerminalDisplay(Display):
    """Draws in the upper part of the terminal; the guest's text scrolls in the lower one.

    Sources: ECMA-48, and the scrolling region (DECSTBM) and saved cursor (DECSC) of the VT100.
    """

    def __init__(self, *, with_text: bool) -> None:
        self._with_text = with_text
        self._last_s = 0.0
        self._size: tuple[int, int] | None = None

    def refresh(self, board: RunningBoard, *, now: bool) -> None:
        time_s = time.monotonic()
        if not now and time_s - self._last_s < _EVERY_S:
            return
        self._last_s = time_s
        columns, lines = shutil.get_terminal_size()
        rows = max(1, lines - (_TEXT_ROWS if self._with_text else 1))
        out = ""
        if self._size != (columns, lines):
            self._size = (columns, lines)
            out += f"\x1b[2J\x1b[{rows + 1};{lines}r\x1b[{rows + 1};1H"
        shown = board.picture()
        picture = Picture(shown.width, shown.height, shown.rgb())
        colour = wants_colour(sys.stdout)
        drawn = picture_lines(picture, columns, rows, colour=colour)
        out += "\x1b7" + "".join(f"\x1b[{n};1H{line}" for n, line in enumerate(drawn, 1)) + "\x1b8"
        _write(out)

    def close(self, board: RunningBoard) -> None:
        if self._size is not None:
            _write(f"\x1b[r\x1b[{self._size[1]};1H\n")


def _write(text: str) -> None:
    # Bypass sys.stdout's buffer, to stay in order with the guest's own output.
    rest = text.encode(errors="replace")
    with suppress(OSError):  # the terminal was closed
        while rest:
            try:
                rest = rest[os.write(1, rest) :]
            except BlockingIOError:  # the serial line's reader shares the terminal's open file
                room = select.poll()
                room.register(1, select.POLLOUT)
                room.poll(_EVERY_S * 1e3)
