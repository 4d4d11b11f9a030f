"""The help of every command at the width of an ordinary terminal."""

from __future__ import annotations

from collections.abc import Iterator

import click
import pytest
from click.testing import CliRunner

from stillframe.cli.main import cli


def _commands(command: click.Command, words: tuple[str, ...] = ()) -> Iterator[tuple[str, ...]]:
    yield words
    if isinstance(command, click.Group):
        context = click.Context(command)
        for name in command.list_commands(context):
            child = command.get_command(context, name)
            assert child is not None
            yield from _commands(child, (*words, name))


@pytest.mark.parametrize("words", list(_commands(cli)), ids=lambda words: " ".join(words) or "-")
def test_no_sentence_is_cut(words: tuple[str, ...]) -> None:
    done = CliRunner().invoke(
        cli, [*words, "--help"], prog_name="stillframe", terminal_width=80, max_content_width=80
    )
    assert done.exit_code == 0
    _, _, listed = done.output.partition("\nCommands:\n")
    assert [line for line in listed.splitlines() if line.endswith("...")] == []
    assert bool(listed) == (words in ((), ("board",), ("key",), ("image",)))
