"""``python -m stillframe.machine.board.guests NAME.c -o NAME.elf``: build a guest in C."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

from stillframe.errors import StillframeError
from stillframe.machine.board.guests import GUEST_NAMES, build_guest, build_own_guest


def _main() -> int:
    parser = argparse.ArgumentParser(
        prog="python -m stillframe.machine.board.guests",
        description="Build a guest of the board from a C file that defines board_main().",
    )
    parser.add_argument("source", type=Path, nargs="?", help="C file, or directory with C files")
    parser.add_argument("-o", dest="output", type=Path, help="ELF file (the source's name .elf)")
    parser.add_argument("--own", action="store_true", help="build the package's own, in place")
    arguments = parser.parse_args()
    if arguments.own == (arguments.source is not None):
        parser.error("give a source, or --own")
    try:
        if arguments.own:
            for name in GUEST_NAMES:
                build_own_guest(name)
        else:
            output = arguments.output or Path(arguments.source.name).with_suffix(".elf")
            sys.stderr.write(build_guest(arguments.source, output))
    except StillframeError as error:
        sys.stderr.write(f"error: {error}\n")
        return error.exit_code
    return 0


if __name__ == "__main__":
    sys.exit(_main())
