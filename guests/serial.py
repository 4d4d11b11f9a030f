"""The dialogue with a guest over its serial line: tick records, commands, answers.

``guests/common/guest.h`` defines the lines.
"""

from __future__ import annotations

import contextlib
import re
import socket
import threading
import time
from collections import deque
from pathlib import Path

import msgspec

from stillframe.errors import MachineError

KEPT_LINES = 20_000
CONNECT_PAUSE_S = 0.02
_FIELD = re.compile(r"(\w+)=(\d+)")


class Tick(msgspec.Struct, frozen=True, kw_only=True):
    """One tick line. All values are the guest's own, except ``received_s`` (our monotonic clock).

    ``n``: number of the tick. ``t_ms``: the guest's TSC since its start; under TCG it stands still
    in a stop. ``passes``: complete passes after the first. ``pages``: pages written.
    ``gap_us``: longest time between two TSC readings since the previous tick; ``gap_max_us``: since
    the start or ``reset``; ``over_1ms``: number of gaps of 1 ms or more.
    ``stop_us``: how long the TSC stood still since the previous tick, found by comparing it with
    the host's clock at each change of second; ``stop_max_us``: the most in one second.
    ``stall_max_us``: the most of longest gap plus stop in one second: no stall was longer.
    ``seconds``: changes of second seen; the "stop" and "stall" values are settled after two.
    """

    n: int
    t_ms: int
    passes: int
    pages: int
    gap_us: int
    gap_max_us: int
    stop_us: int
    stop_max_us: int
    stall_max_us: int
    over_1ms: int
    seconds: int
    received_s: float = 0.0


def parse_tick(line: str, received_s: float = 0.0) -> Tick | None:
    """Parse a tick line; return None for any other line, or a garbled one."""
    if not line.startswith("tick "):
        return None
    fields: dict[str, object] = {name: int(value) for name, value in _FIELD.findall(line)}
    try:
        return msgspec.convert(fields | {"received_s": received_s}, Tick)
    except msgspec.ValidationError:
        return None


class SerialConsole:
    """A connection to the Unix socket of a serial line, with its own reader thread.

    QEMU drops the lines that the guest prints while no client is connected.

    Args:
        path: the socket of QEMU's ``-chardev socket,server=on``.
        timeout_s: how long to wait for the socket to appear and accept.

    Raises:
        MachineError: nothing listens there.
    """

    def __init__(self, path: Path, *, timeout_s: float = 60.0) -> None:
        self.path = path
        self._lines: deque[tuple[int, float, str]] = deque(maxlen=KEPT_LINES)
        self._count = 0
        self._closed = False
        self._news = threading.Condition()
        self._socket = self._connect(timeout_s)
        self._thread = threading.Thread(target=self._read, name=f"serial {path.name}", daemon=True)
        self._thread.start()

    def _connect(self, timeout_s: float) -> socket.socket:
        deadline = time.monotonic() + timeout_s
        while True:
            link = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
            try:
                link.connect(str(self.path))
            except OSError as error:
                link.close()
                if time.monotonic() > deadline:
                    raise MachineError(
                        f"cannot connect to the serial line {self.path}", why=error.strerror
                    ) from error
                time.sleep(CONNECT_PAUSE_S)
            else:
                return link

    def _read(self) -> None:
        rest = b""
        while True:
            try:
                data = self._socket.recv(65536)
            except OSError:
                data = b""
            with self._news:
                *lines, rest = (rest + data).split(b"\n")
                for line in lines:
                    text = line.decode("ascii", "replace").rstrip("\r")
                    self._lines.append((self._count, time.monotonic(), text))
                    self._count += 1
                self._closed = not data
                self._news.notify_all()
            if not data:
                return

    @property
    def closed(self) -> bool:
        """Whether the other side has closed the connection."""
        return self._closed

    def mark(self) -> int:
        """Return the current position: the number of lines received so far."""
        with self._news:
            return self._count

    def lines(self, since: int = 0) -> list[str]:
        """Return the lines received after the mark ``since``; very old lines are discarded."""
        with self._news:
            return [text for number, _, text in self._lines if number >= since]

    def timed_lines(self, since: int = 0) -> list[tuple[float, str]]:
        """As :meth:`lines`, each with the time (monotonic) at which it arrived."""
        with self._news:
            return [(at, text) for number, at, text in self._lines if number >= since]

    def ticks(self, since: int = 0) -> list[Tick]:
        """Return the tick records among :meth:`lines`."""
        kept = self.timed_lines(since)
        return [tick for at, text in kept if (tick := parse_tick(text, at))]

    def wait_line(self, pattern: str, *, timeout_s: float, since: int = 0) -> str:
        """Wait for the first line after ``since`` that contains a match of the regular expression.

        Raises:
            MachineError: none came in time, or the connection was closed.
        """
        wanted = re.compile(pattern)
        deadline = time.monotonic() + timeout_s
        position = since
        with self._news:
            while True:
                for number, _, text in self._lines:
                    if number >= position and wanted.search(text):
                        return text
                position = self._count
                left = deadline - time.monotonic()
                if self._closed or left <= 0:
                    last = self._lines[-1][2] if self._lines else "nothing"
                    raise MachineError(
                        f"the guest did not print '{pattern}' within {timeout_s:g} s",
                        why="its serial line was closed" if self._closed else None,
                        remedy=f"its last line was: {last}",
                    )
                self._news.wait(left)

    def wait_tick(self, timeout_s: float = 60.0, *, since: int | None = None) -> Tick:
        """Wait for the next tick after now, or after the mark ``since``.

        Raises:
            MachineError: none came in time.
        """
        start = self.mark() if since is None else since
        self.wait_line(r"^tick .*seconds=\d+$", timeout_s=timeout_s, since=start)
        return self.ticks(start)[0]

    def send(self, text: str) -> None:
        """Type a line.

        Raises:
            MachineError: the connection is closed.
        """
        try:
            self._socket.sendall(text.encode("ascii") + b"\n")
        except OSError as error:
            raise MachineError(f"cannot send '{text}' to the guest", why=error.strerror) from error

    def command(self, text: str, *, timeout_s: float = 60.0) -> str:
        """Send ``audit``, ``reset`` or ``quit``; return the guest's answer, one line.

        Raises:
            MachineError: no answer in time, or the connection is closed.
        """
        start = self.mark()
        self.send(text)
        return self.wait_line(
            rf"^({re.escape(text)} |unknown command)", timeout_s=timeout_s, since=start
        )

    def is_progressing(self, within_s: float = 60.0) -> bool:
        """Return whether the guest's clock advances within that time, by two new ticks."""
        deadline = time.monotonic() + within_s
        start = self.mark()
        with self._news:
            while True:
                seen = [
                    tick
                    for number, _, text in self._lines
                    if number >= start and (tick := parse_tick(text))
                ]
                if len(seen) >= 2 and seen[-1].t_ms > seen[0].t_ms:
                    return True
                left = deadline - time.monotonic()
                if self._closed or left <= 0:
                    return False
                self._news.wait(left)

    def settled_stall_us(self, timeout_s: float = 60.0) -> int:
        """Return the longest stall up to now, with every stop up to now included.

        Waits for two changes of second in the guest (see :class:`Tick`).

        Raises:
            MachineError: the guest does not tick.
        """
        deadline = time.monotonic() + timeout_s
        first = self.wait_tick(timeout_s)
        while True:
            tick = self.wait_tick(max(deadline - time.monotonic(), 0.0))
            if tick.seconds >= first.seconds + 2:
                return max(tick.stall_max_us, tick.gap_max_us)

    def close(self) -> None:
        """Disconnect. The guest runs on."""
        with contextlib.suppress(OSError):
            self._socket.shutdown(socket.SHUT_RDWR)
        self._thread.join(timeout=5)
        self._socket.close()
