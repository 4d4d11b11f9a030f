"""What a board can be made of."""

from __future__ import annotations

from typing import Any

import pytest

from stillframe.board.hardware.board import Board
from stillframe.board.hardware.config import BoardConfig
from stillframe.errors import HostError, UsageError


def test_defaults_make_a_board() -> None:
    config = BoardConfig()
    assert config.vcpus == 1
    assert config.vram_bytes == 640 * 480 * 4
    assert BoardConfig(display_width=1, display_height=1).vram_bytes == 4096
    assert BoardConfig(ram_bytes=3 << 30, vcpus=8).ram_bytes == 3 << 30


@pytest.mark.parametrize(
    ("wrong", "words"),
    [
        ({"vcpus": 0}, "1 to 8"),
        ({"vcpus": 9}, "1 to 8"),
        ({"ram_bytes": 1 << 20}, "1092 KiB to 3 GiB"),
        ({"ram_bytes": (3 << 30) + 4096}, "3 GiB"),
        ({"ram_bytes": (16 << 20) + 1}, "whole pages"),
        ({"display_width": 0}, "0 pixels"),
        ({"display_height": 100000}, "100000 pixels"),
        ({"command_line": "x" * 1024}, "1024"),
        ({"command_line": "a\0b"}, "NUL"),
    ],
)
def test_what_cannot_be(wrong: dict[str, Any], words: str) -> None:
    with pytest.raises(UsageError, match=words):
        BoardConfig(**wrong)


def test_places_that_cannot_be_opened() -> None:
    with pytest.raises(HostError, match="disk"):
        Board(BoardConfig(disk_path="/nowhere/disk"))
    with pytest.raises(HostError, match="serial"):
        Board(BoardConfig(serial="/nowhere/line"))
    with pytest.raises(HostError, match="serial"):
        Board(BoardConfig(serial="unix:/nowhere/line"))
    with pytest.raises(UsageError, match="serial"):
        Board(BoardConfig(serial=""))
