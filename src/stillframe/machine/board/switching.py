"""Quick hand-over of the GIL while a board is stopped.

A vCPU needs the GIL to park. By default a thread that computes in Python keeps it for up to 5 ms
(``sys.setswitchinterval``), which would be several times the downtime.
"""

from __future__ import annotations

import sys
import threading
from types import TracebackType

_QUICK_S = 50e-6


class QuickSwitching:
    """A context for as long as somebody waits for vCPUs; for several threads at once."""

    _lock = threading.Lock()
    _inside = 0
    _usual_s = 0.0

    def __enter__(self) -> None:
        cls = QuickSwitching
        with cls._lock:
            if cls._inside == 0:
                cls._usual_s = sys.getswitchinterval()
                sys.setswitchinterval(min(_QUICK_S, cls._usual_s))
            cls._inside += 1

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        cls = QuickSwitching
        with cls._lock:
            cls._inside -= 1
            if cls._inside == 0:
                sys.setswitchinterval(cls._usual_s)
