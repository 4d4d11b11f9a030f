"""The program ``stillframe``, slow where a test says: ``slow_program.py PLACE WORDS...``.

``frames``: each frame of an image takes a while. ``load``: clones wait long before they are given
their state. ``sweep``: clones of a running VM run for long before its RAM is saved.
"""

from __future__ import annotations

import sys
import time
from collections.abc import Callable
from typing import Any

from stillframe.cli.main import main
from stillframe.image.filling import Filling
from stillframe.snapshot.encoders import Encoders
from stillframe.still.container import Container

FRAME_S, LONG_S = 0.2, 6.0


def slow(owner: type, name: str, pause_s: float) -> None:
    """Have a method begin late."""
    method: Callable[..., Any] = getattr(owner, name)

    def later(*arguments: Any, **options: Any) -> Any:
        time.sleep(pause_s)
        return method(*arguments, **options)

    setattr(owner, name, later)


if __name__ == "__main__":
    place = sys.argv.pop(1)
    slow(*{
        "frames": (Container, "read_frame", FRAME_S),
        "load": (Filling, "begin", LONG_S),
        "sweep": (Encoders, "drain", LONG_S),
    }[place])  # fmt: skip
    sys.exit(main())
