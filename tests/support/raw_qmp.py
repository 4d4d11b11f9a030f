"""A QMP client that says exactly what a test wants, also what no client should."""

from __future__ import annotations

import array
import itertools
import json
import socket
from typing import Any, Self

TIMEOUT_S = 60.0


class RawQmp:
    """A connection; ``messages`` are whatever lines came, in order. Not our client's code."""

    def __init__(self, address: Any, *, negotiate: bool = True) -> None:
        unix = not isinstance(address, tuple)
        self.socket = socket.socket(socket.AF_UNIX if unix else socket.AF_INET)
        self.socket.settimeout(TIMEOUT_S)
        self.socket.connect(str(address) if unix else address)
        self.events: list[dict[str, Any]] = []
        self._rest = b""
        self._ids = (f"raw-{number}" for number in itertools.count())
        self.greeting = self.receive()
        if negotiate:
            assert self.execute("qmp_capabilities") == {}

    def send(self, data: bytes, fds: tuple[int, ...] = ()) -> None:
        """Send bytes, with descriptors."""
        rights = [(socket.SOL_SOCKET, socket.SCM_RIGHTS, array.array("i", fds))] if fds else []
        sent = self.socket.sendmsg([data], rights) if rights else 0
        self.socket.sendall(data[sent:])

    def receive(self) -> dict[str, Any]:
        """The next message.

        Raises:
            EOFError: the server hung up. TimeoutError: nothing came.
        """
        while b"\n" not in self._rest:
            data = self.socket.recv(1 << 16)
            if not data:
                raise EOFError(self._rest)
            self._rest += data
        line, _, self._rest = self._rest.partition(b"\n")
        message: dict[str, Any] = json.loads(line)
        return message

    def ask(self, data: bytes, fds: tuple[int, ...] = ()) -> dict[str, Any]:
        """Send bytes, and take the next message."""
        self.send(data, fds)
        return self.receive()

    def command(
        self, name: str, arguments: object = None, fds: tuple[int, ...] = ()
    ) -> dict[str, Any]:
        """Send a command, and take its reply; events in between go to ``events``."""
        command_id = next(self._ids)
        message = {"execute": name, "id": command_id}
        if arguments is not None:
            message["arguments"] = arguments  # type: ignore[assignment]
        self.send(json.dumps(message).encode(), fds)
        while (reply := self.receive()).get("id") != command_id:
            assert "event" in reply, reply
            self.events.append(reply)
        del reply["id"]
        return reply

    def execute(self, name: str, arguments: object = None, fds: tuple[int, ...] = ()) -> Any:
        """As ``command``; what it returned."""
        reply = self.command(name, arguments, fds)
        assert "return" in reply, reply
        return reply["return"]

    def error(self, name: str, arguments: object = None) -> tuple[str, str]:
        """As ``command``; class and description of the error."""
        reply = self.command(name, arguments)
        assert "error" in reply, reply
        return reply["error"]["class"], reply["error"]["desc"]

    def replies_to(self, data: bytes) -> list[dict[str, Any]]:
        """Everything that the server says to these bytes, whatever they are."""
        end = next(self._ids)
        self.send(data + b'\xff\n{"execute": "query-version", "id": "%s"}\n' % end.encode())
        replies = []
        while (reply := self.receive()).get("id") != end:
            replies.append(reply)
        return replies

    def heard(self, count: int = 0) -> list[tuple[str, Any]]:
        """Names and data of all events since the last call; waits for ``count`` of them."""
        self.execute("query-version")
        while len(self.events) < count:
            event = self.receive()
            assert "event" in event, event
            self.events.append(event)
        events, self.events = self.events, []
        return [(event["event"], event.get("data")) for event in events]

    def close(self) -> None:
        self.socket.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_error: object) -> None:
        self.close()
