"""A sink that fails as a script tells it."""

from __future__ import annotations

import errno

from stillframe.still.frames import BytesLike
from stillframe.store.backends.oserrors import sink_error
from tests.support_store.memory import MemorySink

_ERRORS = {"E": errno.ENOSPC, "Q": errno.EDQUOT, "I": errno.EIO, "P": errno.EPIPE}


class FaultySink(MemorySink):
    """A memory sink with a script: one letter for each write, then for the commit.

    ``w``: works. ``E``: disk full. ``Q``: over quota. ``I``: I/O error. ``P``: closed pipe.
    After the script's end everything works. ``calls`` records what was called.
    """

    description = "the faulty sink"

    def __init__(self, script: str, *, commit: str = "w") -> None:
        super().__init__()
        self._script = list(script)
        self._commit = commit
        self.calls: list[str] = []

    def write(self, data: BytesLike) -> None:
        self.calls.append("write")
        self._fail("write to", self._script.pop(0) if self._script else "w")
        super().write(data)

    def commit(self) -> None:
        self.calls.append("commit")
        try:
            self._fail("finish", self._commit)
        except Exception:
            super().abort()
            raise
        super().commit()

    def abort(self) -> None:
        self.calls.append("abort")
        super().abort()

    @property
    def is_empty(self) -> bool:
        """Whether nothing stayed behind."""
        return not self._written

    def _fail(self, doing: str, letter: str) -> None:
        if letter != "w":
            number = _ERRORS[letter]
            raise sink_error(doing, self.description, OSError(number, "scripted"))
