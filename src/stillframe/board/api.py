"""The board's public functions."""

from __future__ import annotations

import os
from pathlib import Path
from typing import TypeAlias

from stillframe.board.board_command import parse_options
from stillframe.board.guests import GUEST_NAMES as GUESTS
from stillframe.board.guests import build_guest as compile_guest
from stillframe.board.memory.own_protection import Preference
from stillframe.board.restore_plan import recorded_board
from stillframe.board.running_board import RunningBoard, check_engine
from stillframe.errors import UsageError
from stillframe.store.backends.local import LocalSink

__all__ = ["GUESTS", "RunningBoard", "build_guest", "check", "start"]

StrPath: TypeAlias = str | os.PathLike[str]

check = check_engine


def build_guest(source: StrPath, output: StrPath) -> str:
    """Compile a guest for the board: a C file, or a directory of them, with the guest library.

    Returns:
        The compiler's warnings.

    Raises:
        NotFoundError: no such source. UsageError: the compiler refuses it, in its words; or the
            output is no name for a file. SinkError: it has no directory that may be written to.
        HostError: there is no C compiler.
    """
    LocalSink(output, overwrite=True).abort()  # its name and directory, as those of other outputs
    return compile_guest(Path(source), Path(output))


def start(
    guest: StrPath | None = None,
    *,
    ram_bytes: int | None = None,
    vcpus: int | None = None,
    name: str = "",
    qmp: StrPath | None = None,
    disk: StrPath | None = None,
    incoming: StrPath | None = None,
    display: StrPath | None = None,
    resolution: str | None = None,
    serial: str = "none",
    append: str = "",
    paused: bool = False,
    protection: Preference = "auto",
) -> RunningBoard:
    """Start a board, our own VM, in this process; it has threads of its own.

    Args:
        guest: an ELF file (docs/design/board.md), or one of ``GUESTS``; may be left out with
            ``incoming``, and is needed for a reset only then.
        ram_bytes: 64 MiB if it is not said. vcpus: 1 if it is not said.
        name: in ``ps``; else as its guest.
        qmp: where its monitor listens; else in a private place, see ``RunningBoard.qmp``.
        disk: a raw file, which the guest may write to.
        incoming: a snapshot file, a file with a stream, or a migration URI, in place of a start.
            A snapshot file also tells RAM, vCPUs, resolution, guest, name and command line, where
            they are not said.
        display: recorded only: whoever wants the picture asks ``save_picture``.
        resolution: of the display, such as ``640x480``.
        serial: ``stdio``, ``none``, a file, or ``unix:PATH``.
        append: the guest's command line.
        paused: the guest waits for ``cont``.
        protection: how it write-protects its RAM for snapshots that it takes of itself.

    Raises:
        UsageError: options that make no sense, or nothing to run.
        HostError: the extra ``board`` is not installed, or the host does not give what is needed.
        NotFoundError, DataError: the guest, or what is to come in, cannot be read.
    """
    given = {
        "--ram": ram_bytes,
        "--cpus": vcpus,
        "--name": name or None,
        "--disk": disk,
        "--display": display,
        "--resolution": resolution,
        "--serial": serial,
        "--append": append or None,
        "--protection": protection,
    }
    words = [] if guest is None else [os.fspath(guest)]
    words += [f"{option}={value}" for option, value in given.items() if value is not None]
    source = None if incoming is None else os.fspath(incoming)
    if "" in (guest, source):
        raise UsageError("an empty word is no file", remedy="name a guest, or what is to come in")
    base = recorded_board(source) if source is not None else None
    return RunningBoard(
        parse_options(words, cwd=str(Path.cwd()), base=base).board,
        qmp=None if qmp is None else os.fspath(qmp),
        incoming=source,
        paused=paused,
    )
