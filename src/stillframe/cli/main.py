"""The program ``stillframe``: finds the command, and turns errors into exit codes.

Each command has its own module, imported when the command is used; :mod:`stillframe.api` is
imported only when a command runs.
"""

from __future__ import annotations

import signal
import sys
from collections.abc import Sequence

import click
from click.exceptions import NoArgsIsHelpError

from stillframe import wings
from stillframe.cli.cancelling import ignore_interrupts
from stillframe.cli.failures import ReaderGone, report
from stillframe.cli.lazy import LazyGroup
from stillframe.cli.other_verbs import OTHER_VERBS
from stillframe.cli.output import prepare_streams, write_result
from stillframe.errors import SnapshotCancelled, UsageError
from stillframe.version import __version__

PROGRAM = "stillframe"
COMMANDS = {
    "ps": "stillframe.cli.ps",
    "doctor": "stillframe.cli.doctor",
    "take": "stillframe.cli.take",
    "watch": "stillframe.cli.watch",
    "ls": "stillframe.cli.ls",
    "commit": "stillframe.cli.commit",
    "show": "stillframe.cli.show",
    "diff": "stillframe.cli.diff",
    "verify": "stillframe.cli.verify",
    "export": "stillframe.cli.export",
    "import": "stillframe.cli.import_",
    "restore": "stillframe.cli.restore",
    "fork": "stillframe.cli.fork",
    "kill": "stillframe.cli.kill",
    "image": "stillframe.cli.image",
    "init": "stillframe.cli.init",
    "key": "stillframe.cli.key",
    "rm": "stillframe.cli.rm",
    "tag": "stillframe.cli.tag",
    "prune": "stillframe.cli.prune",
    "copy": "stillframe.cli.copy",
    "check": "stillframe.cli.check",
    "repair": "stillframe.cli.repair",
}
"""Each command and its module, in the order of the help; the wings' commands follow."""


class _Commands(LazyGroup):
    """The program's commands."""

    def resolve_command(
        self, ctx: click.Context, args: list[str]
    ) -> tuple[str | None, click.Command | None, list[str]]:
        verb = args[0]
        if verb in OTHER_VERBS and self.get_command(ctx, verb) is None:
            raise UsageError(f"there is no command '{verb}'", remedy=OTHER_VERBS[verb])
        return super().resolve_command(ctx, args)

    def invoke(self, ctx: click.Context) -> object:
        try:
            return super().invoke(ctx)
        except KeyboardInterrupt as error:  # click would print an empty line
            raise SnapshotCancelled("cancelled") from error


@click.group(
    PROGRAM,
    cls=_Commands,
    modules=COMMANDS | wings.commands(),
    context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 100},
    epilog="Exit codes: docs/reference/errors.md. Shell completion: docs/reference/completion.md.",
)
@click.version_option(__version__, message="%(prog)s %(version)s")
def cli() -> None:
    """Background snapshots of running virtual machines."""


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the program; return its exit code (docs/reference/errors.md).

    Args:
        arguments: by default the process's own, which is then taken to be about to exit: after a
            cancellation it ignores further interrupts.
    """
    words = list(sys.argv[1:] if arguments is None else arguments)
    prepare_streams()
    try:
        # A signal that was ignored at the start (nohup, a background job) stays ignored.
        for number in (signal.SIGTERM, signal.SIGINT):
            if signal.getsignal(number) == signal.SIG_DFL:
                signal.signal(number, signal.default_int_handler)
        status = cli.main(words, prog_name=PROGRAM, standalone_mode=False)
        write_result("", sys.stdout)
    except NoArgsIsHelpError as error:
        error.show()
        return error.exit_code
    except SystemExit:  # click raises this when the reader of standard output is gone
        return report(ReaderGone(), as_json=False)
    except (KeyboardInterrupt, Exception) as error:  # noqa: BLE001 - the last stop
        if arguments is None and isinstance(error, (KeyboardInterrupt, SnapshotCancelled)):
            ignore_interrupts()
        return report(error, as_json=_asks_for_json(words), with_guest=words[:1] == ["take"])
    return status if isinstance(status, int) else 0


def _asks_for_json(words: Sequence[str]) -> bool:
    """Return whether ``--json`` is among the options, even if they cannot be parsed."""
    own = words[: words.index("--")] if "--" in words else words
    return "--json" in own


if __name__ == "__main__":
    sys.exit(main())
