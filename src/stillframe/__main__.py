"""Entry point of ``python -m stillframe`` and of the program ``stillframe``."""

from __future__ import annotations

# The C part of ``signal``. That module imports enum, which takes longer than everything here.
import _signal  # type: ignore[import-not-found]
import sys


def main() -> int:
    """Load the program, run it, and return its exit code (docs/reference/errors.md).

    While it loads there is nothing to clean up, so Ctrl-C simply kills it; a KeyboardInterrupt
    would print a traceback from the middle of an import. ``cli.main`` takes the signal over.
    """
    if _signal.getsignal(_signal.SIGINT) is _signal.default_int_handler:
        _signal.signal(_signal.SIGINT, _signal.SIG_DFL)
    from stillframe.cli.main import main as run

    return run()


if __name__ == "__main__":
    sys.exit(main())
