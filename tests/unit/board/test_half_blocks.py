"""Pictures as text: shape, colours, and the two halves of a cell."""

from __future__ import annotations

import re

import pytest

from stillframe.board.cli.half_blocks import Picture, cells, picture_lines

RED, GREEN, BLACK, WHITE = b"\xff\0\0", b"\0\xff\0", b"\0\0\0", b"\xff\xff\xff"


def test_two_pixels_in_a_cell(monkeypatch: pytest.MonkeyPatch) -> None:
    picture = Picture(2, 2, RED + GREEN + BLACK + WHITE)
    monkeypatch.setenv("COLORTERM", "truecolor")
    assert list(picture_lines(picture, 2, 1, colour=True)) == [
        "\x1b[38;2;255;0;0;48;2;0;0;0m▀\x1b[38;2;0;255;0;48;2;255;255;255m▀\x1b[0m"
    ]
    monkeypatch.delenv("COLORTERM")
    assert list(picture_lines(picture, 2, 1, colour=True)) == [
        "\x1b[38;5;196;48;5;16m▀\x1b[38;5;46;48;5;231m▀\x1b[0m"
    ]


def test_a_colour_is_said_once_in_a_row() -> None:
    (line,) = picture_lines(Picture(4, 2, WHITE * 8), 4, 1, colour=True)
    assert line.count("\x1b[38") == 1
    assert line.count("▀") == 4


def test_without_colour() -> None:
    picture = Picture(3, 2, WHITE + BLACK + RED + WHITE + BLACK + GREEN)
    assert list(picture_lines(picture, 3, 1, colour=False)) == ["█ ░"]


@pytest.mark.parametrize(
    ("size", "room", "wanted"),
    [
        ((640, 480), (80, 24), (64, 24)),
        ((640, 480), (20, 24), (20, 8)),
        ((1, 1), (80, 24), (48, 24)),
        ((4096, 2), (80, 24), (80, 1)),
        ((2, 4096), (80, 24), (1, 24)),
    ],
)
def test_the_shape_is_kept(
    size: tuple[int, int], room: tuple[int, int], wanted: tuple[int, int]
) -> None:
    picture = Picture(*size, bytes(3 * size[0] * size[1]))
    assert cells(picture, *room) == wanted
    lines = list(picture_lines(picture, *room, colour=True))
    plain = [re.sub(r"\x1b\[[0-9;]*m", "", line) for line in lines]
    assert (len(plain[0]), len(plain)) == wanted
    assert len(set(map(len, plain))) == 1


def test_an_area_is_averaged() -> None:
    checkers = (WHITE + BLACK) * 3 + (BLACK + WHITE) * 3
    picture = Picture(6, 6, checkers * 3)
    assert picture.mean(0, 0, 6, 6) in {(255, 255, 255), (0, 0, 0)} | {
        (n * 255 // 9,) * 3 for n in range(10)
    }


def test_a_portable_pixmap() -> None:
    picture = Picture.from_ppm(b"P6\n2 1\n255\n" + b"\n \t" + RED)
    assert (picture.width, picture.height) == (2, 1)
    assert picture.pixel(0, 0) == (10, 32, 9)
    assert picture.pixel(1, 0) == (255, 0, 0)
    with pytest.raises(ValueError, match="pixmap"):
        Picture.from_ppm(b"P5\n2 1\n255\n" + bytes(6))
