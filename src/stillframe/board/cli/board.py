"""``stillframe board``: our own VM."""

from __future__ import annotations

import click

from stillframe.cli.lazy import LazyGroup

_COMMANDS = {"run": "stillframe.board.cli.board_run", "build": "stillframe.board.cli.board_build"}


@click.group("board", cls=LazyGroup, modules=_COMMANDS)
def command() -> None:
    """Our own VM, with migrate and background snapshots inside."""
