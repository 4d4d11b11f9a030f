"""A synchronous, thread-safe QMP client.

The thread that asks writes its command itself and waits; one daemon thread per client reads, and
hands each answer straight to who asked. Commands are kept short, and may be announced, because
QEMU reads its monitor byte by byte, at about 5 µs each: stop, device state and cont are the
downtime.

The socket can be inherited by a guard process, which goes on talking to the VM when this process
dies; so it is never shut down, only closed.

Protocol: QEMU ``docs/interop/qmp-spec.rst``; descriptors travel as SCM_RIGHTS on the unix socket
(``qapi/misc.json``: add-fd).
"""

from __future__ import annotations

import itertools
import logging
import queue
import socket
import threading
import time
from collections.abc import Callable, Mapping
from types import TracebackType

import msgspec

from stillframe.errors import InternalError, MachineError, UsageError
from stillframe.qmp.connection import (
    Address,
    address_text,
    greeting_error,
    no_qmp_error,
    open_socket,
)
from stillframe.qmp.events import EventLog, QmpEvent
from stillframe.qmp.framing import FramingError
from stillframe.qmp.link import Link, Message

logger = logging.getLogger(__name__)

_LOOK_REMEDY = "look whether the VM still runs"
_STUCK_REMEDY = f"its main loop may be stuck; {_LOOK_REMEDY}"
_JOIN_S = 2.0
_ANNOUNCE_S = 1.0

Waiter = queue.SimpleQueue[Message | None]
"""Where an asker waits: its answer, or None when the connection ends."""


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
    """A descriptor that the VMM holds now: its set, and its number in the VMM."""

    fdset_id: int
    fd: int

    @property
    def path(self) -> str:
        """What to give a QMP command as a file name (QEMU ``util/osdep.c``: qemu_open)."""
        return f"/dev/fdset/{self.fdset_id}"


class QmpClient:
    """A connection to one QMP monitor. Use ``connect``; close it, or use it in ``with``."""

    def __init__(self, address: Address, sock: socket.socket) -> None:
        self._address = address
        self._link = Link(sock)
        self._events = EventLog()
        self._greeting: Mapping[str, object] = {}
        self._waiters: dict[object, Waiter] = {}
        self._write_lock = threading.Lock()
        self._announced: bytes | None = None
        self._state_lock = threading.Lock()
        self._fd_lock = threading.Lock()
        self._alive = False
        self._closed = False
        self._lost_callbacks: list[Callable[[], None]] = []
        self._thread = threading.Thread(
            target=self._read, name=f"qmp {address_text(address)}", daemon=True
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
        try:
            self._negotiate(deadline_s, timeout_s)
        except BaseException:
            self.close()
            raise
        self._alive = True
        self._thread.start()
        return self

    def _negotiate(self, deadline_s: float, timeout_s: float) -> None:
        try:
            # No server says more than one thing before it is asked.
            greeting = self._link.receive(deadline_s)[0].get("QMP")
            if not isinstance(greeting, Mapping):
                raise no_qmp_error(self._address)
            self._greeting = greeting
            self._link.send(b'{"execute": "qmp_capabilities"}\n', deadline_s)
            if "return" not in self._first_answer(deadline_s):
                raise no_qmp_error(self._address)
        except FramingError as error:
            raise no_qmp_error(self._address) from error
        except (OSError, EOFError) as error:
            raise greeting_error(
                self._address, error, timeout_s, greeted=bool(self._greeting)
            ) from error

    def _first_answer(self, deadline_s: float) -> Message:
        """What answers the negotiation; the server may send an event just before."""
        while True:
            for message in self._link.receive(deadline_s):
                if "event" not in message:
                    return message

    # What the connection is

    @property
    def address(self) -> str | tuple[str, int]:
        """What ``connect`` was given."""
        return self._address

    @property
    def socket(self) -> socket.socket:
        """The connected socket: dup it for a guard process, do not read from it here."""
        return self._link.socket

    def fileno(self) -> int:
        """The socket's descriptor number, -1 after ``close``."""
        return self._link.socket.fileno()

    @property
    def alive(self) -> bool:
        """Whether the connection stands, as far as is known now."""
        return self._alive

    @property
    def version(self) -> tuple[int, int, int]:
        """The VMM's version from the greeting: (major, minor, micro)."""
        numbers = _as_map(_as_map(self._greeting.get("version")).get("qemu"))
        major, minor, micro = (_as_int(numbers.get(k)) for k in ("major", "minor", "micro"))
        return (major, minor, micro)

    @property
    def package(self) -> str:
        """The VMM's package string from the greeting, such as ``Debian 1:7.2+dfsg-7``."""
        return str(_as_map(self._greeting.get("version")).get("package") or "")

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
            UsageError: the arguments cannot be written as JSON.
        """
        if threading.get_ident() == self._thread.ident:
            raise InternalError("a QMP command was called for from an event callback")
        body = _body(command, arguments)
        deadline_s = time.monotonic() + timeout_s
        waiter: Waiter = queue.SimpleQueue()
        with self._state_lock:
            if not self._alive:
                raise self._lost_error(command)
            # Of one that never answered the number stays taken: its answer may come yet.
            command_id = next(n for n in itertools.count() if n not in self._waiters)
            self._waiters[command_id] = waiter
        self._write(command, body + b',"id":%d}' % command_id, deadline_s)
        try:
            reply = waiter.get(timeout=max(0.0, deadline_s - time.monotonic()))
        except queue.Empty:
            raise MachineError(
                f"the VM did not answer '{command}' within {timeout_s:g} s",
                remedy=_STUCK_REMEDY,
                guest_state="unknown",
            ) from None
        if reply is None:
            raise self._lost_error(command)
        failure = reply.get("error")
        if failure is not None:
            error_class, description = (str(_as_map(failure).get(key)) for key in ("class", "desc"))
            raise QmpCommandError(command, error_class, description)
        return reply.get("return")

    def hmp(self, command_line: str, *, timeout_s: float = 30.0) -> str:
        """Run a command of the human monitor and return its text (errors come as text, too).

        Raises:
            MachineError: as ``execute``.
        """
        text = self.execute(
            "human-monitor-command", {"command-line": command_line}, timeout_s=timeout_s
        )
        return text if isinstance(text, str) else ""

    def _lost_error(self, command: str) -> MachineError:
        return MachineError(
            f"lost the monitor {address_text(self._address)} at '{command}'",
            remedy=_LOOK_REMEDY,
            guest_state="unknown",
        )

    def announce(self, command: str, arguments: Mapping[str, object] | None = None) -> None:
        """Send the beginning of a command that is likely to be the next; it is not run yet.

        ``execute`` of the same command and arguments then only has to complete it; any other one
        makes the VMM forget it first. The guest is not touched.

        Raises:
            MachineError: the connection was lost.
            UsageError: as ``execute``.
        """
        body = _body(command, arguments)
        with self._write_lock:
            self._send(command, self._forgetting() + body, time.monotonic() + _ANNOUNCE_S)
            self._announced = body

    def _forgetting(self) -> bytes:
        """What makes the VMM drop an announced command, if there is one.

        The byte ends any JSON; the VMM answers with an error that nobody waits for (QEMU
        ``docs/interop/qmp-spec.rst``, synchronization).
        """
        announced, self._announced = self._announced, None
        return b"" if announced is None else b"\xff\n"

    def _write(
        self, command: str, data: bytes, deadline_s: float, fds: tuple[int, ...] = ()
    ) -> None:
        with self._write_lock:
            announced = self._announced
            if announced is not None and data.startswith(announced):
                data, self._announced = data[len(announced) :], None
            else:
                data = self._forgetting() + data
            self._send(command, data, deadline_s, fds)

    def _send(
        self, command: str, data: bytes, deadline_s: float, fds: tuple[int, ...] = ()
    ) -> None:
        try:
            self._link.send(data, deadline_s, fds)
        except (OSError, ValueError) as error:
            # Half a command may be out: nothing that follows would be understood.
            self._end()
            raise self._lost_error(command) from error

    # The reading thread

    def _read(self) -> None:
        try:
            self._link.receive_until_stopped(self._dispatch)
        except (OSError, FramingError) as error:
            logger.debug("%s: %s", address_text(self._address), error)
        finally:
            self._end()

    def _dispatch(self, message: Message) -> None:
        if "event" in message:
            self._events.note(message)
            return
        waiter = self._waiters.pop(message.get("id"), None)
        if waiter is not None:  # else: nobody waits for it any more
            waiter.put(message)

    def _end(self) -> None:
        """The connection is over: wake all who wait, and tell, once."""
        with self._state_lock:
            was_alive, self._alive = self._alive, False
            waiters = list(self._waiters.values())
            callbacks = list(self._lost_callbacks) if was_alive and not self._closed else []
        for waiter in waiters:
            waiter.put(None)
        for callback in callbacks:
            try:
                callback()
            except Exception:
                logger.exception("a callback failed")

    # Descriptors

    @property
    def passes_fds(self) -> bool:
        """Whether descriptors can be handed over (unix sockets only)."""
        return self._link.socket.family == socket.AF_UNIX

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
        if not self._alive:
            raise self._lost_error("send_fd")
        # QEMU takes descriptors with any byte, and a blank between commands means nothing.
        self._write("send_fd", b" ", time.monotonic() + timeout_s, (fd,))

    def add_fd(self, fd: int, *, opaque: str = "stillframe") -> AddedFd:
        """Hand a descriptor to the VMM as a new fd set. The caller may close its own copy.

        Raises:
            UsageError, MachineError: as ``send_fd`` and ``execute``.
        """
        with self._fd_lock:  # a descriptor and its add-fd belong together
            self.send_fd(fd)
            reply = _as_map(self.execute("add-fd", {"opaque": opaque}))
        return AddedFd(fdset_id=_as_int(reply.get("fdset-id")), fd=_as_int(reply.get("fd")))

    def remove_fd(self, added: AddedFd) -> None:
        """Make the VMM close a descriptor given by ``add_fd``.

        QEMU does so only while the guest runs; of a paused one, when it runs again and another
        descriptor is removed, or the monitor is disconnected (QEMU ``monitor/fds.c``).

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
        return self._events.subscribe(callback)

    def on_lost(self, callback: Callable[[], None]) -> None:
        """Call ``callback`` once, in the client's thread, if the connection is lost."""
        with self._state_lock:
            self._lost_callbacks.append(callback)

    # The end

    def close(self) -> None:
        """Disconnect and end the thread; never raises, and does nothing the second time.

        The guest is left as it is; a process that inherited the socket keeps its connection. Not
        for event callbacks: the thread that runs them cannot wait for its own end.
        """
        with self._state_lock:
            if self._closed:
                return
            self._closed = True
        self._link.stop()
        if self._thread.is_alive() and threading.get_ident() != self._thread.ident:
            self._thread.join(_JOIN_S)
        self._end()
        if not self._thread.is_alive():
            self._link.close()

    def __enter__(self) -> QmpClient:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.close()


def _body(command: str, arguments: Mapping[str, object] | None) -> bytes:
    """A command without its id and its end."""
    message: Message = {"execute": command}
    if arguments is not None:
        message["arguments"] = arguments
    try:
        return msgspec.json.encode(message)[:-1]
    except (TypeError, ValueError, RecursionError) as error:
        raise UsageError(f"cannot send '{command}'", why=str(error)) from error


def _as_map(value: object) -> Mapping[str, object]:
    return value if isinstance(value, Mapping) else {}


def _as_int(value: object) -> int:
    return value if isinstance(value, int) else 0
