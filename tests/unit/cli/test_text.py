"""Text for a terminal."""

from __future__ import annotations

import io

import pytest

from stillframe.cli import text


def test_printable_shows_what_a_terminal_would_obey() -> None:
    assert text.printable("web1 größe") == "web1 größe"
    assert text.printable("a\x1b[2Jb\n\tc\x9b\u202e") == "a\\x1b[2Jb\\n\\tc\\x9b\\u202e"
    assert text.printable("x\udcff") == "x\\udcff"


def test_table_aligns_and_escapes() -> None:
    lines = text.table(("NAME", "SIZE"), [("a", "1"), ("\x1b", "100")], right="SIZE")
    assert lines == ["NAME  SIZE", "a        1", "\\x1b   100"]
    assert text.table(("A",), []) == ["A"]


def test_facts() -> None:
    assert text.facts([("a", "1"), ("long", "2\n")]) == ["a     1", "long  2\\n"]
    assert text.facts([]) == []


class _Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


@pytest.mark.parametrize(
    ("environment", "wanted"),
    [
        ({"TERM": "xterm"}, True),
        ({"TERM": "xterm", "NO_COLOR": "1"}, False),
        ({"TERM": "xterm", "NO_COLOR": ""}, True),
        ({"TERM": "dumb"}, False),
        ({}, False),
    ],
)
def test_colour(environment: dict[str, str], wanted: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("TERM", "NO_COLOR"):
        monkeypatch.delenv(name, raising=False)
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    assert text.wants_colour(_Terminal()) is wanted
    assert not text.wants_colour(io.StringIO())
    monkeypatch.setattr("sys.stdout", _Terminal())
    assert text.paint("ok", "green") == ("\x1b[32mok\x1b[0m" if wanted else "ok")
