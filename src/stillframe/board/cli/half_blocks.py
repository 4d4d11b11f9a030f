"""A picture as text: each character cell shows two pixels, one above the other.

Sources: ECMA-48 (SGR), the direct-colour and 256-colour forms that xterm has.
"""

from __future__ import annotations

import os
from collections.abc import Iterator

_UPPER_HALF = "▀"
_SHADES = " ░▒▓█"
_RESET = "\x1b[0m"

Pixel = tuple[int, int, int]


class Picture:
    """Pixels of three bytes: red, green and blue; rows packed."""

    def __init__(self, width: int, height: int, rgb: bytes) -> None:
        self.width = width
        self.height = height
        self._rgb = rgb

    @classmethod
    def from_ppm(cls, content: bytes) -> Picture:
        """Parse a binary portable pixmap without comments (netpbm's ppm(5)).

        Raises:
            ValueError: ``content`` is not one.
        """
        magic, width, height, depth, _ = content.split(maxsplit=4)
        if magic != b"P6" or depth != b"255":
            raise ValueError("no portable pixmap of one byte a colour")
        pixels = int(width) * int(height)
        return cls(int(width), int(height), content[len(content) - 3 * pixels :])

    def pixel(self, x: int, y: int) -> Pixel:
        """Return red, green and blue."""
        at = (y * self.width + x) * 3
        return self._rgb[at], self._rgb[at + 1], self._rgb[at + 2]

    def mean(self, left: int, top: int, right: int, bottom: int) -> Pixel:
        """Return the mean colour of an area, from a sample of at most 25 of its pixels."""
        xs = range(left, right, max(1, (right - left) // 3))
        ys = range(top, bottom, max(1, (bottom - top) // 3))
        pixels = [self.pixel(x, y) for y in ys for x in xs]
        red, green, blue = (sum(parts) // len(pixels) for parts in zip(*pixels, strict=True))
        return red, green, blue


def picture_lines(picture: Picture, columns: int, rows: int, *, colour: bool) -> Iterator[str]:
    """Yield the picture in at most ``columns`` by ``rows`` character cells, one line per row.

    The picture keeps its aspect ratio.

    Args:
        colour: 24-bit colours where the terminal announces them, else 256; without it, shades of
            the text colour.
    """
    width, height = cells(picture, columns, rows)
    for row in range(height):
        line = [
            tuple(_area(picture, column, width, 2 * row + half, 2 * height) for half in (0, 1))
            for column in range(width)
        ]
        yield _coloured(line) if colour else "".join(map(_shade, line))


def cells(picture: Picture, columns: int, rows: int) -> tuple[int, int]:
    """Return how many of these columns and rows of character cells a picture takes."""
    scale = max(picture.width / columns, picture.height / (2 * rows))
    width = max(1, min(columns, round(picture.width / scale)))
    return width, max(1, min(rows, round(picture.height / scale / 2)))


def _area(picture: Picture, column: int, columns: int, row: int, rows: int) -> Pixel:
    left, right = (picture.width * n // columns for n in (column, column + 1))
    top, bottom = (picture.height * n // rows for n in (row, row + 1))
    left, top = min(left, picture.width - 1), min(top, picture.height - 1)
    return picture.mean(left, top, max(right, left + 1), max(bottom, top + 1))


def _coloured(line_cells: list[tuple[Pixel, ...]]) -> str:
    direct = os.environ.get("COLORTERM", "") in ("truecolor", "24bit")
    line, last = "", ""
    for upper, lower in line_cells:
        code = (
            f"\x1b[38;2;{_numbers(upper)};48;2;{_numbers(lower)}m"
            if direct
            else f"\x1b[38;5;{_of_256(upper)};48;5;{_of_256(lower)}m"
        )
        line += (code if code != last else "") + _UPPER_HALF
        last = code
    return line + _RESET


def _numbers(pixel: Pixel) -> str:
    return ";".join(map(str, pixel))


def _of_256(pixel: Pixel) -> int:
    """Return the nearest colour of xterm's 6x6x6 cube, as if its levels were evenly spaced."""
    red, green, blue = (round(part / 51) for part in pixel)
    return 16 + 36 * red + 6 * green + blue


def _shade(cell: tuple[Pixel, ...]) -> str:
    light = sum(sum(pixel) for pixel in cell) / (len(cell) * 3 * 255)
    return _SHADES[min(len(_SHADES) - 1, int(light * len(_SHADES)))]
