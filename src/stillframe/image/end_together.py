"""The common end of clones: they are killed if this process dies before their image is complete."""

from __future__ import annotations

import contextlib
import os
import select
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

from stillframe.errors import HostError

_READY_MS = 10_000


class EndTogether:
    """A process that kills VMs as soon as this one has died, however it died, until :meth:`part`.

    Args:
        pidfds: of the VMs; the caller keeps owning them.

    Raises:
        HostError: it does not start.
    """

    def __init__(self, pidfds: Sequence[int]) -> None:
        theirs, self._held_fd = os.pipe()
        self._ready_fd, ready_there = os.pipe()
        try:
            self._process = subprocess.Popen(
                [sys.executable, "-I", "-S", str(Path(__file__).with_name("end_process.py")),
                 str(theirs), str(ready_there), *map(str, pidfds)],
                pass_fds=(theirs, ready_there, *pidfds),
                stdin=subprocess.DEVNULL, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL,
                start_new_session=True, cwd="/",
            )  # fmt: skip
        except OSError as error:
            self._close()
            raise HostError("what ends the clones with us does not start", why=str(error)) from None
        finally:
            os.close(theirs)
            os.close(ready_there)

    def await_ready(self) -> None:
        """Wait until the process watches this one.

        Raises:
            HostError: it does not start.
        """
        poll = select.poll()
        poll.register(self._ready_fd, select.POLLIN)
        if not poll.poll(_READY_MS) or os.read(self._ready_fd, 1) != b"R":
            raise HostError("what ends the clones with us does not start")

    def part(self) -> None:
        """Let the VMs live on without this process. Idempotent; never raises."""
        if self._held_fd < 0:
            return
        with contextlib.suppress(BrokenPipeError):
            os.write(self._held_fd, b"P")
        self._close()
        self._process.wait()

    def _close(self) -> None:
        os.close(self._held_fd)
        os.close(self._ready_fd)
        self._held_fd = self._ready_fd = -1
