"""Output of results and messages: results on standard output, all else on standard error."""

from __future__ import annotations

import io
import json
import os
import sys
from collections.abc import Iterable
from typing import Any, TextIO

from stillframe.cli.text import printable
from stillframe.errors import SinkError


class Results:
    """The output of a command's result.

    Args:
        as_json: show JSON instead of text.
        to_stderr: standard output carries a stream (``-o -``), so use standard error.
    """

    def __init__(self, *, as_json: bool, to_stderr: bool = False) -> None:
        self.as_json = as_json
        self._stream: TextIO = sys.stderr if to_stderr else sys.stdout

    def show(self, data: object, lines: Iterable[str]) -> None:
        """Show ``data`` as JSON, or the lines."""
        text = json_text(data) if self.as_json else "".join(f"{line}\n" for line in lines)
        write_result(text, self._stream)


def write_result(text: str, stream: TextIO) -> None:
    """Write the text and flush the stream.

    Raises:
        SinkError: the disk is full, for instance. BrokenPipeError: the reader is gone.
    """
    try:
        stream.write(text)
        stream.flush()
    except BrokenPipeError:
        raise
    except OSError as error:
        give_up_stdout()
        raise SinkError(
            "the result cannot be written to standard output", why=error.strerror
        ) from error


def json_text(data: object) -> str:
    """Format as indented JSON, in ASCII because file names need not be Unicode."""
    return json.dumps(data, indent=2) + "\n"


def as_object(record: object) -> Any:
    """Convert a record (msgspec.Struct) to plain dicts, lists and scalars, by field name."""
    import msgspec

    return msgspec.to_builtins(record)


def say(line: str) -> None:
    """Print one line on standard error."""
    try:
        sys.stderr.write(f"{printable(line)}\n")
        sys.stderr.flush()
    except (OSError, ValueError):
        return  # standard error is closed; the work goes on


def prepare_streams() -> None:
    """Make the standard streams usable, however the program was started.

    A closed stream is opened on /dev/null, so that no file of ours gets its number. A character
    that the locale lacks is shown as an escape.
    """
    for number in range(3):
        try:
            os.fstat(number)
        except OSError:
            os.open(os.devnull, os.O_RDWR)  # gets the lowest free number, which is this one
    for name, number in (("stdout", 1), ("stderr", 2)):
        if getattr(sys, name) is None:
            setattr(sys, name, os.fdopen(os.dup(number), "w"))
    if sys.stdin is None:
        sys.stdin = os.fdopen(os.dup(0), "r")
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="backslashreplace")


def give_up_stdout() -> None:
    """Redirect standard output to /dev/null, so that Python's flush at exit does not fail."""
    nowhere = os.open(os.devnull, os.O_WRONLY)
    os.dup2(nowhere, 1)
    os.close(nowhere)
