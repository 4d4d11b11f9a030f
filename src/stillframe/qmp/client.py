"""A synchronous, thread-safe QMP client over the ``qemu.qmp`` package.

One daemon thread per client runs the asyncio loop that owns the connection; callers of any thread
hand it commands and wait. The socket is made here and not by ``qemu.qmp``, so that a guard
process can inherit it and go on talking to the VM when this process dies.

Protocol: QEMU ``docs/interop/qmp-spec.rst``; descriptors travel as SCM_RIGHTS on the unix socket
(``qapi/misc.json``: add-fd).
"""

from __future__ import annotations

import asyncio
import concurrent.futures
import contextlib
import itertools
import json
import logging
import queue
import select
import socket
import threading
import time
from array import array
from collections.abc import Callable, Mapping
from types import TracebackType

import msgspec
from qemu.qmp import ConnectError, QMPClient, QMPError, Runstate
from qemu.qmp.message import Message

from stillframe.errors import InternalError, MachineError, UsageError
from stillframe.qmp.connection import Address, address_text, greeting_error, open_socket
from stillframe.qmp.events import EventLog, QmpEvent

_log = logging.getLogger(__name__)

_LOOKUP_REMEDY = "look whether the VM still runs"
_CLOSE_TIMEOUT_S = 2.0


class QmpCommandError(MachineError):
    """The VMM answered a command with an error. The guest's state is what it was before.

    ``command``: what was asked. ``error_class``: QMP's class, usually ``GenericError``.
    ``description``: the VMM's own words.
    """

    def __init__(self, command: str, error_class: str, description: str) -> None:
        super().__init__(f"the VM refused '{command}'", why=description, guest_state="unknown")
        self.command = command
        self.error_class = error_class
        self.description = description


class AddedFd(msgspec.Struct, frozen=True, kw_only=True):
    """A descriptor that the VMM holds now: its set, its number there, and the path to open."""

    fdset_id: int
    fd: int

    @property
    def path(self) -> str:
        """What to give a QMP command as a file name (QEMU ``util/osdep.c``: qemu_open)."""
        return f"/dev/fdset/{self.fdset_id}"


class _Reader(QMPClient):
    """The package's client as we use it: it greets, negotiates, reads, and tells of events.

    Commands are written by the thread that asks, and their answers handed straight to it: two
    thread switches and two tasks less on the downtime path. The debug log, whose indented JSON
    costs more than a round trip, is left out.
    """

    def __init__(self) -> None:
        super().__init__("stillframe")
        self.waiters: dict[str, queue.SimpleQueue[Message | None]] = {}
        if not self.logger.handlers:
            # Errors reach the caller as exceptions; without a handler Python would print them too.
            self.logger.addHandler(logging.NullHandler())

    def _cb_outbound(self, msg: Message) -> Message:
        return msg

    def _cb_inbound(self, msg: Message) -> Message:
        return msg

    async def _on_message(self, msg: Message) -> None:
        command_id = msg.get("id")
        waiter = self.waiters.pop(command_id, None) if isinstance(command_id, str) else None
        if waiter is None:
            await super()._on_message(msg)
        else:
            waiter.put(msg)


class QmpClient:
    """A connection to one QMP monitor. Use ``connect``; close it, or use it in ``with``."""

    def __init__(self, address: Address, sock: socket.socket) -> None:
        self._address = address
        self._socket = sock
        self._client = _Reader()
        self._events = EventLog()
        self._fd_lock = threading.Lock()
        self._write_lock = threading.Lock()
        self._state_lock = threading.Lock()
        self._ids = itertools.count()
        self._closed = False
        self._lost = False
        self._lost_callbacks: list[Callable[[], None]] = []
        self._loop = asyncio.new_event_loop()
        self._loop.set_exception_handler(_note_loop_error)
        self._thread = threading.Thread(
            target=self._loop.run_forever, name=f"qmp {address_text(address)}", daemon=True
        )

    @classmethod
    def connect(cls, address: str | tuple[str, int], *, timeout_s: float = 5.0) -> QmpClient:
        """Connect and negotiate. The guest is not touched.

        Args:
            address: path of a unix socket, or (host, port).
            timeout_s: for the connection and for the greeting together.

        Raises:
            NotFoundError: no such socket.
            BusyError: another client holds the monitor (QEMU serves one at a time).
            HostError: no permission.
            MachineError: nobody listens, no answer, or no QMP behind it.
        """
        deadline_s = time.monotonic() + timeout_s
        sock = open_socket(address, timeout_s)
        self = cls(address, sock)
        self._thread.start()
        future = asyncio.run_coroutine_threadsafe(self._open(), self._loop)
        try:
            future.result(max(0.05, deadline_s - time.monotonic()))
        except (TimeoutError, concurrent.futures.TimeoutError, ConnectError, OSError) as error:
            future.cancel()
            cause = error.exc if isinstance(error, ConnectError) else error
            greeted = self._client.greeting is not None
            failure = greeting_error(address, cause, timeout_s, greeted=greeted)
            self.close()
            raise failure from error
        return self

    async def _open(self) -> None:
        self._client.events.event_filter = self._events.note
        await self._client.connect(self._socket)
        self._supervisor = asyncio.create_task(self._watch_connection())

    async def _watch_connection(self) -> None:
        while self._client.runstate == Runstate.RUNNING:
            await self._client.runstate_changed()
        with self._state_lock:
            self._lost = True
            waiters = list(self._client.waiters.values())
        for waiter in waiters:
            waiter.put(None)
        for callback in self._lost_callbacks:
            self._loop.call_soon(callback)
        with contextlib.suppress(QMPError, OSError, EOFError):
            await self._client.disconnect()

    # What the connection is

    @property
    def address(self) -> str | tuple[str, int]:
        """What ``connect`` was given."""
        return self._address

    @property
    def socket(self) -> socket.socket:
        """The connected socket (non-blocking): dup it for a guard process, do not read from it."""
        return self._socket

    def fileno(self) -> int:
        """The socket's descriptor number, -1 after ``close``."""
        return self._socket.fileno()

    @property
    def alive(self) -> bool:
        """Whether the connection stands, as far as is known now."""
        return not (self._closed or self._lost)

    @property
    def version(self) -> tuple[int, int, int]:
        """The VMM's version from the greeting: (major, minor, micro)."""
        numbers = self._greeting_version().get("qemu")
        if not isinstance(numbers, Mapping):
            return (0, 0, 0)
        major, minor, micro = (_small_int(numbers.get(k)) for k in ("major", "minor", "micro"))
        return (major, minor, micro)

    @property
    def package(self) -> str:
        """The VMM's package string from the greeting, such as ``Debian 1:7.2+dfsg-7``."""
        return str(self._greeting_version().get("package") or "")

    def _greeting_version(self) -> Mapping[str, object]:
        greeting = self._client.greeting
        return greeting.QMP.version if greeting is not None else {}

    # Commands

    def execute(
        self,
        command: str,
        arguments: Mapping[str, object] | None = None,
        *,
        timeout_s: float = 30.0,
    ) -> object:
        """Run one QMP command and return its ``return`` value. Callable from any thread.

        The guest's state afterwards is what the command makes of it.

        Raises:
            QmpCommandError: the VMM answered with an error.
            MachineError: the connection was lost, or no answer came in time (the command may
                still be carried out: ``guest_state`` is ``unknown``).
        """
        if threading.get_ident() == self._thread.ident:
            raise InternalError("a QMP command was called for from an event callback")
        command_id = f"stillframe-{next(self._ids)}"
        message: dict[str, object] = {"execute": command, "id": command_id}
        if arguments is not None:
            message["arguments"] = arguments
        try:
            line = json.dumps(message).encode() + b"\n"
        except (TypeError, ValueError) as error:
            raise UsageError(f"cannot send '{command}'", why=str(error)) from error
        waiter: queue.SimpleQueue[Message | None] = queue.SimpleQueue()
        with self._state_lock:
            if not self.alive:
                raise self._lost_error(command)
            self._client.waiters[command_id] = waiter
        try:
            self._write(command, line, timeout_s)
            reply = waiter.get(timeout=timeout_s)
        except queue.Empty:
            raise MachineError(
                f"the VM did not answer '{command}' within {timeout_s:g} s",
                remedy="its main loop may be stuck; " + _LOOKUP_REMEDY,
                guest_state="unknown",
            ) from None
        finally:
            self._client.waiters.pop(command_id, None)
        if reply is None:
            raise self._lost_error(command)
        failure = reply.get("error")
        if isinstance(failure, Mapping):
            raise QmpCommandError(command, str(failure.get("class")), str(failure.get("desc")))
        return reply.get("return")

    def _write(
        self, command: str, data: bytes, timeout_s: float, fds: tuple[int, ...] = ()
    ) -> None:
        """Send from this thread; nothing else writes once the session stands."""
        deadline_s = time.monotonic() + timeout_s
        rights = [(socket.SOL_SOCKET, socket.SCM_RIGHTS, array("i", fds))] if fds else []
        try:
            with self._write_lock:
                while data:
                    try:
                        sent = self._socket.sendmsg([data], rights, socket.MSG_NOSIGNAL)
                    except BlockingIOError:
                        left_s = deadline_s - time.monotonic()
                        if left_s <= 0:
                            raise
                        select.select([], [self._socket], [], left_s)
                        continue
                    data, rights = data[sent:], []
        except (OSError, ValueError) as error:
            raise self._lost_error(command) from error

    def hmp(self, command_line: str, *, timeout_s: float = 30.0) -> str:
        """Run a command of the human monitor and return its text (errors come as text, too)."""
        text = self.execute(
            "human-monitor-command", {"command-line": command_line}, timeout_s=timeout_s
        )
        return text if isinstance(text, str) else ""

    def _lost_error(self, command: str) -> MachineError:
        return MachineError(
            f"lost the monitor {address_text(self._address)} at '{command}'",
            remedy=_LOOKUP_REMEDY,
            guest_state="unknown",
        )

    # Descriptors

    @property
    def passes_fds(self) -> bool:
        """Whether descriptors can be handed over (unix sockets only)."""
        return self._socket.family == socket.AF_UNIX

    def send_fd(self, fd: int, *, timeout_s: float = 5.0) -> None:
        """Send a descriptor; QEMU keeps it for the next ``getfd`` or ``add-fd``.

        Raises:
            UsageError: the connection is not a unix socket.
            MachineError: the connection was lost.
        """
        if not self.passes_fds:
            raise UsageError(
                f"no descriptor can be passed to {address_text(self._address)}",
                why="it is not a unix socket",
            )
        if not self.alive:
            raise self._lost_error("send_fd")
        # QEMU takes descriptors with any byte, and a blank between commands means nothing.
        self._write("send_fd", b" ", timeout_s, (fd,))

    def add_fd(self, fd: int, *, opaque: str = "stillframe") -> AddedFd:
        """Hand a descriptor to the VMM as a new fd set. The caller may close its own copy.

        Raises:
            UsageError, MachineError: as ``send_fd`` and ``execute``.
        """
        with self._fd_lock:  # a descriptor and its add-fd belong together
            self.send_fd(fd)
            reply = self.execute("add-fd", {"opaque": opaque})
        if not isinstance(reply, Mapping):
            raise MachineError("the VM's answer to 'add-fd' makes no sense", why=repr(reply)[:80])
        return AddedFd(fdset_id=_small_int(reply.get("fdset-id")), fd=_small_int(reply.get("fd")))

    def remove_fd(self, added: AddedFd) -> None:
        """Make the VMM close a descriptor given by ``add_fd``.

        Raises:
            MachineError: as ``execute``.
        """
        self.execute("remove-fd", {"fdset-id": added.fdset_id, "fd": added.fd})

    # Events

    @property
    def events(self) -> EventLog:
        """The events that came since ``connect``."""
        return self._events

    def drain_events(self) -> list[QmpEvent]:
        """Take the events that came since the last call, oldest first."""
        return self._events.drain()

    def subscribe(self, callback: Callable[[QmpEvent], None]) -> Callable[[], None]:
        """Have each event given to ``callback`` in the client's thread; returns the undoing.

        The callback must be quick and must not run QMP commands.
        """

        def deliver(event: QmpEvent) -> None:
            self._loop.call_soon(callback, event)

        return self._events.subscribe(deliver)

    def on_lost(self, callback: Callable[[], None]) -> None:
        """Call ``callback`` once in the client's thread when the connection ends."""
        self._lost_callbacks.append(callback)

    # The end

    def close(self) -> None:
        """Disconnect and end the thread; never raises, and does nothing the second time.

        The guest is left as it is.
        """
        with self._state_lock:
            if self._closed:
                return
            self._closed = True
        future = asyncio.run_coroutine_threadsafe(self._shut(), self._loop)
        # A peer that does not read must not keep us: the socket is closed below in any case.
        concurrent.futures.wait([future], _CLOSE_TIMEOUT_S)
        self._loop.call_soon_threadsafe(self._loop.stop)
        if threading.get_ident() != self._thread.ident:
            self._thread.join(_CLOSE_TIMEOUT_S)
        if not self._loop.is_running():
            self._loop.close()
        self._socket.close()

    async def _shut(self) -> None:
        self._lost_callbacks.clear()
        with contextlib.suppress(QMPError, OSError, EOFError):
            await self._client.disconnect()
        others = asyncio.all_tasks() - {asyncio.current_task()}
        for task in others:
            task.cancel()
        await asyncio.gather(*others, return_exceptions=True)

    def __enter__(self) -> QmpClient:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.close()


def _note_loop_error(_loop: asyncio.AbstractEventLoop, context: dict[str, object]) -> None:
    """A subscriber's mistake is worth a line; the end of a connection is told by ``execute``."""
    level = logging.ERROR if "handle" in context else logging.DEBUG
    _log.log(level, "%s: %r", context.get("message"), context.get("exception"))


def _small_int(value: object) -> int:
    return value if isinstance(value, int) else 0
