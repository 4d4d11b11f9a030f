"""The only place where an error turns into a line, JSON, and an exit code."""

from __future__ import annotations

import os
import sys
import traceback

import click

from stillframe.cli.output import give_up_stdout, json_text, say
from stillframe.errors import (
    InternalError,
    RefusedError,
    SinkError,
    SnapshotCancelled,
    StillframeError,
    UsageError,
)

BROKEN_PIPE_EXIT_CODE = 141
"""The shell's exit code for a program that SIGPIPE killed: 128 + 13."""


class ReaderGone(Exception):  # noqa: N818 - not an error: the reader stopped reading
    """The reader of standard output went away."""


def report(error: BaseException, *, as_json: bool, with_guest: bool = False) -> int:
    """Report an error, and return the exit code.

    Args:
        as_json: also report it as JSON on standard output.
        with_guest: the command was working on a guest.
    """
    if isinstance(error, (ReaderGone, BrokenPipeError)):
        give_up_stdout()
        return BROKEN_PIPE_EXIT_CODE
    if os.environ.get("STILLFRAME_DEBUG") == "1":
        traceback.print_exception(error)
    known = classify_error(error, with_guest=with_guest)
    for line in lines(known):
        say(f"stillframe: {line}")
    if as_json:
        try:
            sys.stdout.write(json_text(known.as_dict()))
            sys.stdout.flush()
        except OSError:
            give_up_stdout()
    return known.exit_code


def classify_error(error: BaseException, *, with_guest: bool = False) -> StillframeError:
    """Convert the error to a StillframeError."""
    if isinstance(error, StillframeError):
        return error
    if isinstance(error, click.ClickException):
        return _usage(error)
    if isinstance(error, (KeyboardInterrupt, click.Abort)):
        return SnapshotCancelled("cancelled")
    if isinstance(error, OSError) and _is_of_echo(error):  # --help, --version
        give_up_stdout()
        return SinkError("standard output cannot be written", why=error.strerror)
    if isinstance(error, MemoryError):
        return InternalError("out of memory", remedy="free some memory, and try again")
    return InternalError(
        f"unexpected {type(error).__name__}",
        why=str(error) or None,
        remedy="please report it, with what STILLFRAME_DEBUG=1 shows",
        guest_state="unknown" if with_guest else "none",
    )


def _is_of_echo(error: OSError) -> bool:
    """Return whether click failed to write its own output."""
    last = traceback.extract_tb(error.__traceback__)[-1:]
    return any(frame.name == "echo" for frame in last)


def _usage(error: click.ClickException) -> UsageError:
    message = " ".join(error.format_message().split()).rstrip(".")  # click puts choices on lines
    context = error.ctx if isinstance(error, click.UsageError) else None
    path = context.command_path if context is not None else "stillframe"
    return UsageError(message[:1].lower() + message[1:], remedy=f"see '{path} --help'")


def lines(error: StillframeError) -> list[str]:
    """Return the error as one line; a refusal with several reasons, as one line for each."""
    suffix = "" if error.guest_state == "none" else f" [guest {error.guest_state}]"
    if isinstance(error, RefusedError) and len(error.reasons) > 1:
        return [f"{name}: {reason}; {remedy}{suffix}" for name, reason, remedy in error.reasons]
    return [f"{error}{suffix}"]
