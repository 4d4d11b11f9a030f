"""The words of ``stillframe board run``, as snapshots and nameplates hold them."""

from __future__ import annotations

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st

from stillframe.board.board_command import (
    PROGRAM_WORDS,
    BoardCommand,
    parse_options,
    words_of_process,
)
from stillframe.errors import DataError, UsageError

_TEXT = st.text(st.characters(blacklist_categories=["Cs"], blacklist_characters="\0"), max_size=20)
_PATHS = st.from_regex(r"/[a-z ]{1,8}(/[a-z.]{1,8})?", fullmatch=True).filter(
    lambda path: "/." not in path
)
COMMANDS = st.builds(
    BoardCommand,
    guest=st.none() | st.sampled_from(["ledger", "life", "/g/own.elf"]) | _PATHS,
    ram_bytes=st.integers(257, (3 << 30) >> 12).map(lambda pages: pages << 12),
    vcpus=st.integers(1, 8),
    name=_TEXT,
    disk=st.none() | _PATHS,
    display=st.none() | st.just("terminal") | _PATHS,
    resolution=st.tuples(st.integers(1, 4096), st.integers(1, 4096)),
    serial=st.sampled_from(["stdio", "none", "/s/log", "unix:/s/sock"]),
    append=_TEXT,
    protection=st.sampled_from(["auto", "userfaultfd", "mprotect"]),
)


@given(COMMANDS)
def test_what_is_written_is_read_again(command: BoardCommand) -> None:
    words = command.words()
    assert words[:3] == PROGRAM_WORDS
    assert parse_options(words[3:], cwd="/elsewhere").board == command


def test_paths_are_made_absolute() -> None:
    words = ["own.elf", "--disk", "../d.img", "--serial=unix:s", "--display", "a/b.png"]
    parsed = parse_options([*words, "--qmp", "q", "--paused"], cwd="/home/x")
    assert parsed.board == BoardCommand(
        guest="/home/x/own.elf",
        disk="/home/d.img",
        serial="unix:/home/x/s",
        display="/home/x/a/b.png",
    )
    assert parsed.qmp == "/home/x/q"
    assert parsed.paused
    assert parsed.given == {"--disk", "--serial", "--display", "--qmp", "--paused"}


def test_a_packaged_guest_and_sizes() -> None:
    parsed = parse_options(["ledger", "--ram", "256M", "--cpus", "2", "--incoming", "tcp::4444"])
    assert parsed.board == BoardCommand(guest="ledger", ram_bytes=256 << 20, vcpus=2)
    assert parsed.incoming == "tcp::4444"


def test_what_is_not_said_is_as_before() -> None:
    before = BoardCommand(guest="ledger", vcpus=4, name="one")
    parsed = parse_options(["--name", "two"], base=before)
    assert parsed.board == msgspec.structs.replace(before, name="two")


@pytest.mark.parametrize(
    "words",
    [
        ["a.elf", "b.elf"],
        ["--unknown", "1"],
        ["-m", "1G"],
        ["--ram"],
        ["--ram", "1K"],
        ["--ram", "4G"],
        ["--ram", "256M1"],
        ["--ram", "²"],
        ["--cpus", "0"],
        ["--cpus", "9"],
        ["--cpus", "²"],
        ["--resolution", "0x10"],
        ["--protection", "none"],
        ["--disk", ""],
        ["--disk", "a\0b"],
        ["--paused=yes"],
    ],
)
def test_bad_words(words: list[str]) -> None:
    with pytest.raises(UsageError):
        parse_options(words)
    with pytest.raises(DataError):
        parse_options(words, error=DataError)


@pytest.mark.parametrize(
    ("argv", "words"),
    [
        (["/v/bin/python", "/v/bin/stillframe", "board", "run", "x", "--cpus", "2"], 3),
        (["python3", "-P", "-m", "stillframe", "board", "run"], 0),
        (["stillframe", "board", "run", "ledger"], 1),
        (["stillframe", "board", "build", "x.c"], None),
        (["python3", "notstillframe", "board", "run"], None),
        (["sh", "-c", "stillframe board run ledger"], None),
        (["board", "run"], None),
        ([], None),
    ],
)
def test_a_boards_process(argv: list[str], words: int | None) -> None:
    found = words_of_process(argv)
    assert found == (None if words is None else tuple(argv[len(argv) - words :]))
