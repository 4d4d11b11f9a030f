"""``stillframe board build``: compile a guest."""

from __future__ import annotations

from pathlib import Path

import click

from stillframe.cli.options import json_option
from stillframe.cli.output import Results, say
from stillframe.cli.parameters import FILE


@click.command("build", short_help="Compile a guest in C with the board's library.")
@click.argument("source", type=FILE)
@click.option(
    "-o", "--output", type=FILE, metavar="FILE", help="The ELF file to make; else SOURCE's, .elf."
)
@json_option
def command(source: str, output: str | None, as_json: bool) -> None:
    """Compile a guest in C: SOURCE, or all C files of a directory, with the board's library.

    It includes board.h and defines board_main(); docs/guides/board-guest.md shows how.
    """
    from stillframe import board

    made = output or f"{Path(source).name.removesuffix('.c')}.elf"
    for line in board.build_guest(source, made).splitlines():
        say(line)
    Results(as_json=as_json).show({"file": made}, [made])
