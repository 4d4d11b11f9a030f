"""Text for a terminal: free of control sequences, in columns, and in colour if wanted."""

from __future__ import annotations

import os
import sys
from collections.abc import Iterable, Sequence
from typing import Literal, TextIO

Colour = Literal["green", "yellow", "red", "bold"]
_CODES: dict[Colour, str] = {"green": "32", "yellow": "33", "red": "31", "bold": "1"}

FOR_ANALYSIS = "for analysis only: it has no device state, and cannot be restored"


def printable(text: str) -> str:
    """Return the text with control characters and lone surrogates shown as escapes.

    Names of VMs, files and blocks are untrusted, and may contain terminal commands.
    """
    if text.isprintable():
        return text
    return "".join(
        letter if letter.isprintable() else letter.encode("unicode_escape").decode("ascii")
        for letter in text
    )


def wants_colour(stream: TextIO) -> bool:
    """Return whether a stream may get colour (https://no-color.org)."""
    return stream.isatty() and not os.environ.get("NO_COLOR") and is_capable()


def is_capable() -> bool:
    """Return whether the terminal can move its cursor."""
    return os.environ.get("TERM", "dumb") != "dumb"


def paint(text: str, colour: Colour) -> str:
    """Return the text in a colour, if standard output may get colour."""
    return f"\x1b[{_CODES[colour]}m{text}\x1b[0m" if wants_colour(sys.stdout) else text


def table(head: Sequence[str], rows: Iterable[Sequence[str]], *, right: str = "") -> list[str]:
    """Return the lines of a table with aligned columns.

    Args:
        right: names of the right-aligned columns, separated by commas.
    """
    cells = [[printable(cell) for cell in row] for row in [head, *rows]]
    widths = [max(len(row[n]) for row in cells) for n in range(len(head))]
    to_the_right = {head.index(name) for name in right.split(",") if name}
    return [
        "  ".join(
            cell.rjust(width) if n in to_the_right else cell.ljust(width)
            for n, (cell, width) in enumerate(zip(row, widths, strict=True))
        ).rstrip()
        for row in cells
    ]


def facts(pairs: Iterable[tuple[str, str]]) -> list[str]:
    """Return aligned lines of names and values."""
    known = list(pairs)
    width = max((len(name) for name, _ in known), default=0)
    return [f"{name.ljust(width)}  {printable(value)}".rstrip() for name, value in known]
