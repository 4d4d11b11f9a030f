"""A QMP server in a thread that answers as a test tells it to; not QEMU, and not our code."""

from __future__ import annotations

import array
import json
import os
import socket
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

GREETING = {
    "QMP": {
        "version": {"qemu": {"major": 7, "minor": 2, "micro": 22}, "package": "test"},
        "capabilities": ["oob"],
    }
}

_DECODER = json.JSONDecoder()

Answer = Callable[["FakeQmp", dict[str, Any]], object]


class FakeQmp:
    """Listens on a unix socket (or TCP), serves one client.

    ``answer`` gets each command and returns the reply's ``return``, or a dict with the key
    ``error`` to fail; it raises ``SilenceError`` to say nothing.
    """

    def __init__(
        self,
        path: Path | None,
        answer: Answer | None = None,
        *,
        greeting: bytes | None = None,
    ) -> None:
        self.commands: list[dict[str, Any]] = []
        self.fds: list[int] = []
        self.received: list[bytes] = []
        self.connection: socket.socket | None = None
        self._answer = answer or (lambda _server, _command: {})
        self._greeting = greeting if greeting is not None else _line(GREETING)
        if path is None:
            self._listener = socket.create_server(("127.0.0.1", 0))
            self.address: Any = ("127.0.0.1", self._listener.getsockname()[1])
        else:
            self._listener = socket.socket(socket.AF_UNIX)
            self._listener.bind(str(path))
            self._listener.listen(1)
            self.address = str(path)
        self._thread = threading.Thread(target=self._serve, daemon=True)
        self._thread.start()

    def _serve(self) -> None:
        try:
            self.connection, _ = self._listener.accept()
            self.connection.sendall(self._greeting)
            pending = b""
            while True:
                data, ancillary, _flags, _address = self.connection.recvmsg(65536, 1024)
                for _level, _kind, raw in ancillary:
                    self.fds.extend(array.array("i", raw))
                if not data:
                    return
                self.received.append(data)
                pending = (pending + data).lstrip()
                if b"\xff" in pending:  # ends whatever was half said
                    pending = pending.rpartition(b"\xff")[2].lstrip()
                    self.send({"error": {"class": "GenericError", "desc": "JSON parse error"}})
                while pending:
                    try:
                        command, end = _DECODER.raw_decode(pending.decode())
                    except ValueError:
                        break  # not whole yet
                    pending = pending.decode()[end:].encode().lstrip()
                    self._one(command)
        except OSError:  # closed
            return

    def _one(self, command: dict[str, Any]) -> None:
        if command["execute"] == "qmp_capabilities":
            self.send({"return": {}, "id": command.get("id")})
            return
        self.commands.append(command)
        try:
            result = self._answer(self, command)
        except SilenceError:
            return
        if isinstance(result, dict) and "error" in result:
            self.send({"error": result["error"], "id": command["id"]})
        else:
            self.send({"return": result, "id": command["id"]})

    def send(self, message: object) -> None:
        assert self.connection is not None
        self.connection.sendall(message if isinstance(message, bytes) else _line(message))

    def event(self, name: str, **data: object) -> None:
        stamp = {"seconds": 1700000000, "microseconds": 250000}
        self.send({"event": name, "data": data, "timestamp": stamp})

    def hang_up(self) -> None:
        if self.connection is not None:
            self.connection.shutdown(socket.SHUT_RDWR)
            self.connection.close()

    def close(self) -> None:
        self._listener.close()
        if self.connection is not None:
            self.connection.close()
        for fd in self.fds:
            os.close(fd)


class SilenceError(Exception):
    """Do not answer."""


def _line(message: object) -> bytes:
    return json.dumps(message).encode() + b"\r\n"
