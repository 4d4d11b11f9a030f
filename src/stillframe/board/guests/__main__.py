"""``python -m stillframe.board.guests``: build the package's own guests in place.

For work in a checkout without an installation; ``stillframe board build`` compiles other guests.
"""

from __future__ import annotations

import sys

from stillframe.board.guests import GUEST_NAMES, build_own_guest
from stillframe.errors import StillframeError


def _main() -> int:
    try:
        for name in GUEST_NAMES:
            sys.stdout.write(f"{build_own_guest(name)}\n")
    except StillframeError as error:
        sys.stderr.write(f"error: {error}\n")
        return error.exit_code
    return 0


if __name__ == "__main__":
    sys.exit(_main())
