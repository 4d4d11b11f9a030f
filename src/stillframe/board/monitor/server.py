"""A QMP server: any number of sockets, several clients at once (QEMU serves one per socket).

Each client has a thread that reads its input and runs its commands, so a slow command delays only
its own client. A client that does not read never blocks the server or other clients: its messages
are queued, and it is dropped when too many events pile up. No input from a client ends the server.

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
    """A server of one table of commands, until ``close``.

    Args:
        commands: the commands for clients, to which the server adds its own (``server_commands``).
            More may be added later.
        version, package: reported by the greeting and ``query-version``.
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
        """Listen on another address; return it, with the actual port in place of port 0.

        A unix socket gets mode 0600. TCP has no protection whatsoever: any client that can connect
        controls the machine.

        Raises:
            BusyError: another program listens there. UsageError: the address is bad.
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
        """Send an event to all clients that have negotiated. Never blocks or raises.

        Any thread may call it. All clients get events in the same order. Empty ``data`` is left
        out of the message.
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
        """Accept no more clients, let the connected ones read their pending messages, and hang up.

        Waits a few seconds at most for running commands. Never raises; may be repeated.
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
                    # Further clients wait to be accepted, as on QEMU's socket all but the first do.
                    self._client_gone.wait_for(
                        lambda: self._closed or len(self._clients) < _CLIENTS_MAX
                    )
                try:
                    connected, _peer = listener.socket.accept()
                except (BlockingIOError, ConnectionError):
                    continue
                except OSError as error:
                    # Most likely out of descriptors: let the client wait, and try again.
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
                # As QEMU does when the monitor is disconnected (monitor/fds.c).
                self._sets.clear()
            self._client_gone.notify_all()


def _line(message: object) -> bytes:
    return msgspec.json.encode(message) + LINE_END
