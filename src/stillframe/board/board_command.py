"""The command line of ``stillframe board run``: what a snapshot records of a board, and its parser.

The command's own parser (``cli/board_run``) is for people. This one reads words from a process's
command line, a nameplate or a snapshot file, so it accepts full option names only.
"""

from __future__ import annotations

import os
import re
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, get_args

import msgspec

from stillframe.board.guests import GUEST_NAMES
from stillframe.board.hardware.config import BoardConfig
from stillframe.board.hardware.layout import (
    DISPLAY_LIMIT_PIXELS,
    GUEST_GPA,
    PAGE_BYTES,
    RAM_LIMIT_BYTES,
    VCPUS_LIMIT,
)
from stillframe.board.memory.own_protection import Preference
from stillframe.errors import StillframeError, UsageError

PROGRAM_WORDS = ("stillframe", "board", "run")
DEFAULT_RAM_BYTES = 64 << 20
DEFAULT_RESOLUTION = (640, 480)

_SIZE = re.compile(r"([0-9]{1,15})([KMG]?)(?:iB)?")
_RESOLUTION = re.compile(r"([0-9]{1,4})x([0-9]{1,4})")
_UNIT_BYTES = {"": 1, "K": 1 << 10, "M": 1 << 20, "G": 1 << 30}


class BoardCommand(msgspec.Struct, frozen=True, kw_only=True):
    """A board's start options, except its monitor and its incoming stream.

    ``guest``: absolute path of an ELF file, or the name of a packaged guest; None for a board that
    only loads a stream. ``disk``, ``display``: absolute paths; ``display`` may be ``terminal``.
    ``serial``: ``stdio``, ``none``, an absolute path, or ``unix:`` and one. ``append``: the guest's
    command line.
    """

    guest: str | None = None
    ram_bytes: int = DEFAULT_RAM_BYTES
    vcpus: int = 1
    name: str = ""
    disk: str | None = None
    display: str | None = None
    resolution: tuple[int, int] = DEFAULT_RESOLUTION
    serial: str = "stdio"
    append: str = ""
    protection: Preference = "auto"

    def words(self) -> tuple[str, ...]:
        """Return the command that starts such a board."""
        default = BoardCommand(guest=self.guest)
        words = [*PROGRAM_WORDS, *([self.guest] if self.guest is not None else [])]
        for option, (field, _read, write) in _OPTIONS.items():
            value = getattr(self, field)
            if field in _ALWAYS or value != getattr(default, field):
                words += [option, write(value)]
        return tuple(words)


def command_of(config: BoardConfig) -> BoardCommand:
    """Return the command for a board that a program made from ``config``.

    Relative paths are relative to this process's working directory.
    """
    cwd = str(Path.cwd())
    return BoardCommand(
        guest=_optional_path(config.guest_path, cwd),
        ram_bytes=config.ram_bytes,
        vcpus=config.vcpus,
        name=config.name,
        disk=_optional_path(config.disk_path, cwd),
        resolution=(config.display_width, config.display_height),
        serial=_serial(config.serial, cwd),
        append=config.command_line,
    )


class ParsedCommand(msgspec.Struct, frozen=True, kw_only=True):
    """A whole command: the board, its monitor's path, its incoming stream, and ``--paused``."""

    board: BoardCommand
    qmp: str | None = None
    incoming: str | None = None
    paused: bool = False
    given: frozenset[str] = frozenset()
    """The options that the command contains, with their dashes."""


def parse_options(
    words: Sequence[str],
    *,
    cwd: str = "/",
    base: BoardCommand | None = None,
    error: type[StillframeError] = UsageError,
) -> ParsedCommand:
    """Parse the words after ``stillframe board run``.

    Args:
        cwd: the directory that relative paths start from.
        base: supplies the options that the words leave out.

    Raises:
        error: an unknown option, a missing or bad value, or a second guest.
    """
    found: dict[str, Any] = {}
    others: dict[str, Any] = {}
    given: set[str] = set()
    rest = list(words)
    while rest:
        word = rest.pop(0)
        option, equals, value = word.partition("=") if word.startswith("--") else (word, "", "")
        if option == "--paused" and not equals:
            others["paused"] = True
            given.add(option)
            continue
        if not option.startswith("-"):
            if "guest" in found:
                raise error(f"{word!r}: a board has one guest")
            found["guest"] = _guest(word, cwd)
            continue
        if option not in _OPTIONS and option not in ("--qmp", "--incoming"):
            raise error(f"{word!r} is no option of 'stillframe board run'")
        if not equals:
            if not rest:
                raise error(f"{option} has no value")
            value = rest.pop(0)
        given.add(option)
        try:
            if option in _OPTIONS:
                field, read, _write = _OPTIONS[option]
                found[field] = read(value, cwd)
            else:
                others[option[2:]] = _path(value, cwd) if option == "--qmp" else value
        except ValueError as reason:
            raise error(f"{option} {value!r}: {reason}") from reason
    board = msgspec.structs.replace(base or BoardCommand(), **found)
    return ParsedCommand(board=board, given=frozenset(given), **others)


def words_of_process(argv: Sequence[str]) -> tuple[str, ...] | None:
    """Return the words after ``stillframe board run`` in a process's command line, or None."""
    for at in range(1, min(len(argv), 8) - 1):
        if tuple(argv[at : at + 2]) == PROGRAM_WORDS[1:] and (
            argv[at - 1].rpartition("/")[2] == PROGRAM_WORDS[0]
        ):
            return tuple(argv[at + 2 :])
    return None


def _guest(word: str, cwd: str) -> str:
    """Return the name of a packaged guest, or an absolute path."""
    return word if word in GUEST_NAMES else _path(word, cwd)


def _path(text: str, cwd: str) -> str:
    if not text or "\0" in text:
        raise ValueError("no path")
    return os.path.normpath(Path(cwd, text))


def _optional_path(path: str | None, cwd: str) -> str | None:
    return None if path is None else _path(path, cwd)


def _ram(text: str, _cwd: str) -> int:
    match = _SIZE.fullmatch(text)
    if match is None:
        raise ValueError("not a size; write 256M or 1G, or a number of bytes")
    size = int(match[1]) * _UNIT_BYTES[match[2]]
    if not GUEST_GPA < size <= RAM_LIMIT_BYTES or size % PAGE_BYTES:
        raise ValueError(
            f"it must be more than {GUEST_GPA >> 20} MiB, up to {RAM_LIMIT_BYTES >> 30} GiB, in"
            f" whole pages of {PAGE_BYTES >> 10} KiB"
        )
    return size


def _vcpus(text: str, _cwd: str) -> int:
    if not text.isascii() or not text.isdigit() or not 1 <= int(text[:4]) <= VCPUS_LIMIT:
        raise ValueError(f"a board has 1 to {VCPUS_LIMIT} vCPUs")
    return int(text)


def _resolution(text: str, _cwd: str) -> tuple[int, int]:
    match = _RESOLUTION.fullmatch(text)
    if match is None or not all(0 < int(side) <= DISPLAY_LIMIT_PIXELS for side in match.groups()):
        raise ValueError(
            "no resolution; write one such as 640x480, each side 1 to"
            f" {DISPLAY_LIMIT_PIXELS} pixels"
        )
    return int(match[1]), int(match[2])


def _display(text: str, cwd: str) -> str:
    return text if text == "terminal" else _path(text, cwd)


def _serial(text: str, cwd: str) -> str:
    if text in ("stdio", "none"):
        return text
    if text.startswith("unix:"):
        return f"unix:{_path(text.removeprefix('unix:'), cwd)}"
    return _path(text, cwd)


def _protection(text: str, _cwd: str) -> str:
    if text not in get_args(Preference):
        raise ValueError(f"write {', '.join(get_args(Preference))}")
    return text


def _text(text: str, _cwd: str) -> str:
    return text


_OPTIONS: dict[str, tuple[str, Callable[[str, str], object], Callable[[Any], str]]] = {
    "--ram": ("ram_bytes", _ram, str),
    "--cpus": ("vcpus", _vcpus, str),
    "--name": ("name", _text, str),
    "--disk": ("disk", _path, str),
    "--display": ("display", _display, str),
    "--resolution": ("resolution", _resolution, lambda size: f"{size[0]}x{size[1]}"),
    "--serial": ("serial", _serial, str),
    "--append": ("append", _text, str),
    "--protection": ("protection", _protection, str),
}
"""Each option's field, its reader and its writer."""

_ALWAYS = frozenset({"ram_bytes", "vcpus"})
"""Recorded even at their defaults, since the defaults may change."""
