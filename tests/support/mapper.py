"""A process that maps a file as a clone does, and touches what it is told to."""

from __future__ import annotations

import select
import subprocess
import sys

from tests.support.ordinary_user import interpreter_for_all

_CHILD = """
import mmap, sys
fd, length, kind = int(sys.argv[1]), int(sys.argv[2]), sys.argv[3]
flags = mmap.MAP_SHARED if kind == "shared" else mmap.MAP_PRIVATE
memory = mmap.mmap(fd, length, flags=flags)
print("ready", flush=True)
for line in sys.stdin:
    what, offset, *value = line.split()
    if what == "w":
        memory[int(offset)] = int(value[0])
    print(memory[int(offset)], flush=True)
"""


class Mapper:
    """Ended with the context."""

    def __init__(
        self, fd: int, length_bytes: int, kind: str, *, lent: int = -1, user: int | None = None
    ) -> None:
        """``lent``: another descriptor that it inherits. ``user``: whose process it is."""
        program = sys.executable if user is None else interpreter_for_all()
        self.process = subprocess.Popen(
            [program, "-c", _CHILD, str(fd), str(length_bytes), kind],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            pass_fds=(fd,) if lent < 0 else (fd, lent),
            user=user,
        )
        self.pid = self.process.pid
        assert self._line(60) == "ready"

    def _line(self, within_s: float) -> str | None:
        assert self.process.stdout is not None
        if not select.select([self.process.stdout], [], [], within_s)[0]:
            return None
        return self.process.stdout.readline().strip()

    def touch(self, offset: int) -> None:
        """Read a byte; it may have to wait."""
        self._send(f"r {offset}")

    def write(self, offset: int, value: int) -> None:
        """Write a byte; it may have to wait."""
        self._send(f"w {offset} {value}")

    def _send(self, line: str) -> None:
        assert self.process.stdin is not None
        self.process.stdin.write(line + "\n")
        self.process.stdin.flush()

    def answer(self, within_s: float = 60.0) -> int | None:
        """The byte that it found; None if it still waits."""
        line = self._line(within_s)
        return None if line is None else int(line)

    def close(self) -> None:
        self.process.kill()
        self.process.wait()
        assert self.process.stdin is not None
        assert self.process.stdout is not None
        self.process.stdin.close()
        self.process.stdout.close()

    def __enter__(self) -> Mapper:
        return self

    def __exit__(self, *_error: object) -> None:
        self.close()
