"""``stillframe board run``: run a guest on our own VM, in this process."""

from __future__ import annotations

import os
import select
import signal
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from types import FrameType
from typing import TYPE_CHECKING, Any

import click
from click.shell_completion import CompletionItem

from stillframe.board.cli.board_display import Display, choose_display
from stillframe.cli.failures import ReaderGone
from stillframe.cli.output import say
from stillframe.cli.parameters import FILE, Size
from stillframe.errors import SnapshotCancelled

if TYPE_CHECKING:
    from stillframe.board import RunningBoard

_POLL_S = 0.1
_RAM = Size(least=1 << 20, most=3 << 30)
_END = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)


class GuestType(click.ParamType):  # type: ignore[type-arg]
    """An ELF file, or the name of a packaged guest."""

    name = "guest"

    def shell_complete(
        self, ctx: click.Context, param: click.Parameter, incomplete: str
    ) -> list[CompletionItem]:
        from stillframe import board

        names = [name for name in board.GUESTS if name.startswith(incomplete)]
        files = [CompletionItem(incomplete, type="file")]
        return [CompletionItem(name) for name in names] or files


@click.command("run", short_help="Run a guest: an ELF file, or one that comes with us.")
@click.argument("guest", required=False, type=GuestType())
@click.option("--ram", "ram_bytes", type=_RAM, help="The guest's RAM; 64M, or as in the snapshot.")
@click.option(
    "--cpus", "vcpus", type=click.IntRange(1, 8), help="Its processors; 1, or as in the snapshot."
)
@click.option("--name", default="", help="What the board is called; else as its guest.")
@click.option(
    "--qmp", type=FILE, metavar="SOCKET", help="Where its monitor listens; else a private place."
)
@click.option("--disk", type=FILE, metavar="FILE", help="A raw disk, which the guest may write to.")
@click.option(
    "--incoming",
    metavar="FILE|URI",
    help="Load a snapshot, or a stream from a file, tcp:, unix: or fd:; 'defer' waits for QMP.",
)
@click.option(
    "--display",
    type=FILE,
    metavar="FILE.png|terminal",
    help="Where its picture goes: a file, at the end and on SIGUSR1; or this terminal.",
)
@click.option("--resolution", metavar="WxH", help="Of the picture; 640x480 without it.")
@click.option(
    "--serial",
    default="stdio",
    show_default=True,
    metavar="stdio|FILE|none|unix:PATH",
    help="The guest's serial line.",
)
@click.option("--append", default="", metavar="TEXT", help="The guest's command line.")
@click.option("--paused", is_flag=True, help="Do not let the guest run yet.")
@click.option(
    "--protection",
    type=click.Choice(["auto", "userfaultfd", "mprotect"]),
    default="auto",
    show_default=True,
    help="How it write-protects its own RAM when it takes a snapshot of itself.",
)
@click.pass_context
def command(
    context: click.Context, /, guest: str | None, display: str | None, serial: str, **options: Any
) -> None:
    """Run GUEST, a static x86-64 ELF file or one of ledger, life and writer.

    Ends with the status that the guest powers off with, 0 after 'quit', 134 if the guest panics,
    and 130 after Ctrl-C. Drive it over QMP as a QEMU; 'stillframe take' snapshots it.
    """
    import logging

    from stillframe import board

    logging.basicConfig(format="stillframe: %(message)s", level=logging.WARNING)
    screen = choose_display(display, serial=serial)
    with _requests() as requests:
        running = board.start(guest, display=display, serial=serial, **options)
        try:
            say(f"stillframe: board {running.name} (process {os.getpid()}), QMP at {running.qmp}")
            uses_stdout = serial == "stdio" or display == "terminal"
            status = _follow(running, screen, requests, reader=1 if uses_stdout else None)
        finally:
            screen.close(running)
            running.close()
    context.exit(status)


class _Requests:
    """What signals asked for: the end, or pictures."""

    def __init__(self) -> None:
        self.end: int | None = None
        self.pictures = 0

    def note(self, number: int, frame: FrameType | None) -> None:
        if number == signal.SIGUSR1:
            self.pictures += 1
        else:
            self.end = number


@contextmanager
def _requests() -> Iterator[_Requests]:
    """Handle the signals that are not ignored, for as long as the context."""
    requests = _Requests()
    with ExitStack() as restore:
        for number in (*_END, signal.SIGUSR1):
            before = signal.getsignal(number)
            if before is not signal.SIG_IGN:
                restore.callback(signal.signal, number, before)
                signal.signal(number, requests.note)
        yield requests


def _follow(
    board: RunningBoard, screen: Display, requests: _Requests, *, reader: int | None
) -> int:
    """Wait for the board's end; return its exit status.

    Args:
        reader: the descriptor whose reader's end also ends the board; or None.

    Raises:
        SnapshotCancelled: a signal asked for the end. ReaderGone: the reader is gone.
        StillframeError: the incoming state could not be loaded.
    """
    shown = 0
    while not board.wait(_POLL_S):
        if requests.end is not None:
            raise SnapshotCancelled(f"ended by {signal.Signals(requests.end).name}")
        if reader is not None and _is_gone(reader):
            raise ReaderGone
        screen.refresh(board, now=requests.pictures > shown)
        shown = requests.pictures
    return board.exit_status


def _is_gone(descriptor: int) -> bool:
    """Return whether the reader of a pipe, a socket or a terminal is gone."""
    poll = select.poll()
    poll.register(descriptor, 0)
    return any(events & (select.POLLERR | select.POLLHUP) for _, events in poll.poll(0))
