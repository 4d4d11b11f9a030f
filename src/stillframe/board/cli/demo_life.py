"""The demo's second act: the Game of Life, with pictures of the instant and of now."""

from __future__ import annotations

import time
from collections.abc import Callable
from pathlib import Path

import msgspec

from stillframe.board.cli.demo_board import DemoBoard

GO_ON_S = 0.6
_GENERATIONS_PER_S = 40
_RESOLUTION = (320, 240)
_READY = "life ready"


class LifeResult(msgspec.Struct, frozen=True, kw_only=True):
    """The two pictures: as PNG files, and as portable pixmaps for the terminal."""

    instant_file: str
    now_file: str
    instant: bytes
    now: bytes


def run_life(directory: Path, say: Callable[[str], None]) -> LifeResult:
    """Play the second act.

    Args:
        directory: for sockets, the snapshot and the pictures.

    Raises:
        MachineError: a board failed or did not answer.
    """
    file = directory / "life.stream"
    width, height = _RESOLUTION
    words = ("life", "--ram", "16M", "--resolution", f"{width}x{height}")
    say("5. Another board draws the Game of Life; a snapshot keeps one generation of it")
    with DemoBoard(directory, "life", *words, "--append", f"rate={_GENERATIONS_PER_S}") as life:
        life.qmp("cont")
        say(f"   {life.console.wait(_READY)}")
        time.sleep(GO_ON_S)
        life.snapshot(file)
        time.sleep(GO_ON_S)
        with DemoBoard(directory, "still", *words, "--incoming", f"file:{file}") as still:
            still.wait_loaded()
            boards = {"instant": still, "now": life}
            for name, board in boards.items():
                board.qmp("screendump", filename=str(directory / f"{name}.png"), format="png")
                board.qmp("screendump", filename=str(directory / f"{name}.ppm"))
    return LifeResult(
        instant_file=str(directory / "instant.png"),
        now_file=str(directory / "now.png"),
        instant=(directory / "instant.ppm").read_bytes(),
        now=(directory / "now.ppm").read_bytes(),
    )
