"""``python -m stillframe``, and the program ``stillframe``."""

from __future__ import annotations

# What ``signal`` is made of. That module itself imports enum, which takes longer than all of this.
import _signal  # type: ignore[import-not-found]
import sys


def main() -> int:
    """Load the program and run it; returns its exit code (docs/reference/errors.md).

    Until it is loaded it has nothing to tidy up, so Ctrl-C just ends it; a KeyboardInterrupt would
    show a traceback from the middle of an import. ``cli.main`` takes the signal over.
    """
    if _signal.getsignal(_signal.SIGINT) is _signal.default_int_handler:
        _signal.signal(_signal.SIGINT, _signal.SIG_DFL)
    from stillframe.cli.main import main as run

    return run()


if __name__ == "__main__":
    sys.exit(main())
