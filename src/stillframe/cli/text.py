"""Text for a terminal: nothing that it would obey, columns, and colour where it is wanted."""

from __future__ import annotations

import os
import sys
from collections.abc import Iterable, Sequence
from typing import Literal, TextIO

Colour = Literal["green", "yellow", "red", "bold"]
_CODES: dict[Colour, str] = {"green": "32", "yellow": "33", "red": "31", "bold": "1"}

FOR_ANALYSIS = "for analysis only: it has no device state, and cannot be restored"


def printable(text: str) -> str:
    """The text with control characters and lone surrogates shown as escapes.

    Names of VMs, files and blocks are other people's words, and may hold terminal commands.
    """
    if text.isprintable():
        return text
    return "".join(
        letter if letter.isprintable() else letter.encode("unicode_escape").decode("ascii")
        for letter in text
    )


def wants_colour(stream: TextIO) -> bool:
    """Whether colour may be written to a stream (https://no-color.org)."""
    return stream.isatty() and not os.environ.get("NO_COLOR") and is_capable()


def is_capable() -> bool:
    """Whether the terminal can move its cursor."""
    return os.environ.get("TERM", "dumb") != "dumb"


def paint(text: str, colour: Colour) -> str:
    """The text in a colour, if standard output wants it."""
    return f"\x1b[{_CODES[colour]}m{text}\x1b[0m" if wants_colour(sys.stdout) else text


def table(head: Sequence[str], rows: Iterable[Sequence[str]], *, right: str = "") -> list[str]:
    """Lines of a table with aligned columns.

    Args:
        right: names of columns that are aligned to the right, separated by commas.
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
    """Lines of names and values, aligned."""
    known = list(pairs)
    width = max((len(name) for name, _ in known), default=0)
    return [f"{name.ljust(width)}  {printable(value)}".rstrip() for name, value in known]
