"""A writer of commands to a monitor, which can send the beginning of the likely next one ahead.

QEMU reads its monitor byte by byte, at about 5 µs each; it has already read what was announced.
"""

from __future__ import annotations

import threading

from stillframe.qmp.link import Link


class CommandWriter:
    """The writer of one link; callable from any thread. After an error it cannot send any more:
    half a command may be out, and the VMM could not parse what follows."""

    def __init__(self, link: Link) -> None:
        self._link = link
        self._lock = threading.Lock()
        self._announced: bytes | None = None

    def announce(self, body: bytes, deadline_s: float) -> None:
        """Send the beginning of a command. :meth:`write` of the same command completes it; any
        other one makes the VMM drop it first. Errors as :meth:`Link.send`."""
        with self._lock:
            self._link.send(self._forgetting() + body, deadline_s)
            self._announced = body

    def write(
        self,
        data: bytes,
        deadline_s: float,
        fds: tuple[int, ...] = (),
        *,
        behind: bytes | None = None,
    ) -> None:
        """Send a whole command; errors as :meth:`Link.send`.

        Args:
            fds: descriptors to send with it.
            behind: the beginning of the likely next command, announced in the same send.
        """
        with self._lock:
            announced = self._announced
            if announced is not None and data.startswith(announced):
                data, self._announced = data[len(announced) :], None
            else:
                data = self._forgetting() + data
            self._link.send(data + (behind or b""), deadline_s, fds)
            self._announced = behind

    def _forgetting(self) -> bytes:
        """Return the bytes that make the VMM drop an announced command, if there is one.

        0xff ends any JSON; the VMM answers with an error that no caller waits for (QEMU
        ``docs/interop/qmp-spec.rst``, synchronization).
        """
        announced, self._announced = self._announced, None
        return b"" if announced is None else b"\xff\n"
