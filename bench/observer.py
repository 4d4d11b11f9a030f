"""The benchmark's own QMP connection: it watches the VM while others use the first monitor.

Independent of ``stillframe.qmp``, so that our own code does not time itself. QEMU, like the board,
sends every event to every monitor, with the host's wall clock time in it (QEMU
``qapi/qapi-schema``: events).
"""

from __future__ import annotations

import contextlib
import json
import socket
import threading
import time
from collections.abc import Collection
from pathlib import Path
from typing import Any

import msgspec

from stillframe.errors import MachineError


class Event(msgspec.Struct, frozen=True, kw_only=True):
    """An event of the VM. ``sent_s``: its own wall clock; ``received_s``: our monotonic clock."""

    name: str
    sent_s: float
    received_s: float
    data: dict[str, Any] = {}


class Observer:
    """A client of a ``-qmp`` Unix socket, with its own reader thread.

    Raises:
        MachineError: nothing answers there.
    """

    def __init__(self, path: Path, *, timeout_s: float = 10.0) -> None:
        self._timeout_s = timeout_s
        self._events: list[Event] = []
        self._answers: list[dict[str, Any]] = []
        self._closed = False
        self._news = threading.Condition()
        self._socket = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        try:
            self._socket.connect(str(path))
        except OSError as error:
            self._socket.close()
            raise MachineError(f"cannot connect to {path}", why=error.strerror) from error
        self._thread = threading.Thread(target=self._read, name="observer", daemon=True)
        self._thread.start()
        self.execute("qmp_capabilities")

    def _read(self) -> None:
        with self._socket.makefile("rb") as stream, contextlib.suppress(OSError):
            for line in stream:
                self._take(json.loads(line), time.monotonic())
        with self._news:
            self._closed = True
            self._news.notify_all()

    def _take(self, message: dict[str, Any], now_s: float) -> None:
        with self._news:
            if "event" in message:
                stamp = message["timestamp"]
                sent_s = stamp["seconds"] + stamp["microseconds"] / 1e6
                self._events.append(
                    Event(
                        name=message["event"],
                        sent_s=sent_s,
                        received_s=now_s,
                        data=message.get("data", {}),
                    )
                )
            elif "QMP" not in message:
                self._answers.append(message)
            self._news.notify_all()

    def execute(self, command: str, arguments: dict[str, object] | None = None) -> Any:
        """Send a command and wait for its answer; one at a time.

        Raises:
            MachineError: the VM refused it, did not answer in time, or went away.
        """
        request = {"execute": command} | ({"arguments": arguments} if arguments else {})
        with self._news:
            self._answers.clear()
            try:
                self._socket.sendall(json.dumps(request).encode() + b"\n")
            except OSError as error:
                raise MachineError(f"cannot send {command}", why=error.strerror) from error
            if not self._news.wait_for(lambda: self._answers or self._closed, self._timeout_s):
                raise MachineError(f"the VM did not answer {command} in {self._timeout_s:g} s")
            if not self._answers:
                raise MachineError(f"the VM went away during {command}")
            answer = self._answers.pop(0)
        if "error" in answer:
            raise MachineError(f"the VM refused {command}", why=answer["error"].get("desc"))
        return answer["return"]

    def mark(self) -> int:
        """Return the current position: the number of events so far."""
        with self._news:
            return len(self._events)

    def events(self, since: int) -> list[Event]:
        """Return the events after a :meth:`mark`."""
        with self._news:
            return self._events[since:]

    def wait_event(
        self, name: str, since: int, timeout_s: float, *, status: Collection[str] = ()
    ) -> Event:
        """Wait for the first event of a name after a mark.

        Args:
            status: accept only events with one of these states in their data.

        Raises:
            MachineError: it did not come in time.
        """
        found: list[Event] = []

        def come() -> bool:
            found.extend(
                event
                for event in self._events[since:]
                if event.name == name and (not status or event.data.get("status") in status)
            )
            return bool(found) or self._closed

        with self._news:
            self._news.wait_for(come, timeout_s)
        if not found:
            raise MachineError(f"the VM sent no {name} within {timeout_s:g} s")
        return found[0]

    def close(self) -> None:
        """Disconnect; the VM goes on."""
        with contextlib.suppress(OSError):
            self._socket.shutdown(socket.SHUT_RDWR)
        self._thread.join(5)
        self._socket.close()


def stopped_ms(events: list[Event]) -> float | None:
    """Return the time between STOP and RESUME by the events' own clock, summed over all pairs; None
    without a pair."""
    total_s: float | None = None
    stop_s: float | None = None
    for event in events:
        if event.name == "STOP":
            stop_s = event.sent_s
        elif event.name == "RESUME" and stop_s is not None:
            total_s = (total_s or 0.0) + event.sent_s - stop_s
            stop_s = None
    return None if total_s is None else total_s * 1e3
