"""A QMP server: any number of sockets, several clients at once (QEMU serves one a socket).

Each client has a thread that reads it and runs its commands, so a command that takes long holds up
its own client only. Nobody ever waits for a client to read: what it leaves is kept for a while, and
then it is dropped. Nothing that a client sends ends the server.

Protocol: QEMU ``docs/interop/qmp-spec.rst``. Out-of-band commands are not offered.
"""

from __future__ import annotations

import logging
import os
import select
import socket
import threading
import time
from collections.abc import Mapping

import msgspec

from stillframe.board.monitor.command_set import CommandTable
from stillframe.board.monitor.descriptors import FdSets
from stillframe.board.monitor.server_client import ServerClient
from stillframe.board.monitor.server_commands import add_server_commands
from stillframe.board.monitor.session import LINE_END
from stillframe.qmp.connection import Address, address_text
from stillframe.qmp.listening import Listener, listen

logger = logging.getLogger(__name__)

_CLIENTS_MAX = 32
_CLOSE_S = 3.0
_AGAIN_S = 0.1


class QmpServer:
    """Serves a table of commands until ``close``.

    Args:
        commands: what clients may ask for; the server adds its own (``server_commands``). Commands
            may be added to it later, too.
        version, package: what the greeting and ``query-version`` tell.
    """

    def __init__(
        self, commands: CommandTable, *, version: tuple[int, int, int], package: str = ""
    ) -> None:
        major, minor, micro = version
        told: dict[str, object] = {
            "qemu": {"major": major, "minor": minor, "micro": micro},
            "package": package,
        }
        add_server_commands(commands, told)
        self._commands = commands
        self._greeting = _line({"QMP": {"version": told, "capabilities": []}})
        self._sets = FdSets()
        self._lock = threading.Lock()
        self._clients: list[ServerClient] = []
        self._client_gone = threading.Condition(self._lock)
        self._event_lock = threading.Lock()
        self._listeners: list[tuple[Listener, threading.Thread]] = []
        self._closed = False
        self._stop_fd = os.eventfd(0, os.EFD_CLOEXEC)

    def listen(self, address: Address) -> Address:
        """Serve clients that connect there from now on; returns the address, with its port if 0
        was asked for. A unix socket is made with mode 0600. TCP has no protection whatsoever: who
        can connect, commands the machine.

        Raises:
            BusyError: somebody listens there. UsageError: no good address.
            HostError: the system refuses.
        """
        listener = listen(address)
        thread = threading.Thread(
            target=self._accept, args=(listener,), name=f"qmp {address_text(address)}", daemon=True
        )
        self._listeners.append((listener, thread))
        thread.start()
        return listener.address

    def emit(self, event: str, data: Mapping[str, object] | None = None) -> None:
        """Tell all clients that have negotiated. From any thread; never waits, never raises.

        All clients get events in the same order. ``data``: left out of the message if empty.
        """
        with self._event_lock:
            now_us = time.time_ns() // 1000
            message: dict[str, object] = {
                "timestamp": {"seconds": now_us // 1_000_000, "microseconds": now_us % 1_000_000},
                "event": event,
            }
            if data:
                message["data"] = data
            line = _line(message)
            with self._lock:
                clients = tuple(self._clients)
            for client in clients:
                client.put_event(line)

    def close(self) -> None:
        """Take no more clients, let those there are read what was said to them, and hang up.

        Never raises, does nothing the second time. Waits a few seconds at most, for commands that
        are being carried out.
        """
        with self._lock:
            if self._closed:
                return
            self._closed = True
            clients = tuple(self._clients)
            self._client_gone.notify_all()
        os.eventfd_write(self._stop_fd, 1)
        deadline_s = time.monotonic() + _CLOSE_S
        for _listener, thread in self._listeners:
            thread.join(_CLOSE_S)
        for client in clients:
            client.stop()
        for client in clients:
            client.join(deadline_s)
        self._sets.clear()
        os.close(self._stop_fd)

    # The accepting threads

    def _accept(self, listener: Listener) -> None:
        listener.socket.setblocking(False)
        poller = select.poll()
        poller.register(listener.socket, select.POLLIN)
        poller.register(self._stop_fd, select.POLLIN)
        try:
            while all(fd != self._stop_fd for fd, _event in poller.poll()):
                with self._lock:
                    # Those beyond wait to be accepted, as all but the first do at a QEMU's socket.
                    self._client_gone.wait_for(
                        lambda: self._closed or len(self._clients) < _CLIENTS_MAX
                    )
                try:
                    connected, _peer = listener.socket.accept()
                except (BlockingIOError, ConnectionError):
                    continue
                except OSError as error:
                    # Out of descriptors, most likely: the client waits, and so do we.
                    logger.warning("cannot take a client: %s", error)
                    with self._lock:
                        self._client_gone.wait(_AGAIN_S)
                    continue
                self._serve(connected)
        finally:
            listener.close()

    def _serve(self, connected: socket.socket) -> None:
        with self._lock:
            if self._closed:
                connected.close()
                return
            client = ServerClient(
                connected, self._commands, self._sets, self._greeting, self._forget
            )
            self._clients.append(client)
        try:
            client.start()
        except RuntimeError as error:  # no more threads
            logger.warning("cannot serve a client: %s", error)
            client.hang_up()

    def _forget(self, client: ServerClient) -> None:
        with self._lock:
            self._clients.remove(client)
            if not self._clients:
                # As QEMU does when its monitor is disconnected (monitor/fds.c).
                self._sets.clear()
            self._client_gone.notify_all()


def _line(message: object) -> bytes:
    return msgspec.json.encode(message) + LINE_END
