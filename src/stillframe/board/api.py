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
    """Compile a C file, or a directory of them, with the guest library into a guest for the board.

    Returns:
        The compiler's warnings.

    Raises:
        NotFoundError: the source does not exist.
        UsageError: the compiler rejects it, with the compiler's message; or the output is not a
            valid file name.
        SinkError: the output's directory is missing or not writable.
        HostError: there is no C compiler, or it took too long.
    """
    LocalSink(output, overwrite=True).abort()  # check name and directory, as for any output
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
    """Start a board, our own VM, in this process, on threads of its own.

    Args:
        guest: an ELF file (docs/design/board.md), or one of ``GUESTS``. Optional with
            ``incoming``, where only a reset needs it.
        ram_bytes: 64 MiB by default. vcpus: 1 by default.
        name: shown by ``ps``; the guest's name by default.
        qmp: the monitor's socket path; private by default, see ``RunningBoard.qmp``.
        disk: a raw image, which the guest may write to.
        incoming: a snapshot file, a file with a stream, or a migration URI, to load instead of
            booting. A snapshot file also supplies RAM, vCPUs, resolution, guest, name and command
            line where the caller gives none.
        display: recorded only; ``save_picture`` writes the picture.
        resolution: the display's, such as ``640x480``.
        serial: ``stdio``, ``none``, a file, or ``unix:PATH``.
        append: the guest's command line.
        paused: do not run the guest before ``cont``.
        protection: how the board write-protects its RAM when it takes a snapshot of itself.

    Raises:
        UsageError: the options do not make sense, or there is nothing to run.
        HostError: the extra ``board`` is not installed, or the host lacks a resource.
        NotFoundError, DataError: the guest, the disk or the incoming state cannot be read.
        BusyError, SinkError: a socket is in use, or the picture's file cannot be written.
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
