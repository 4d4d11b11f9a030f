"""A synchronous, thread-safe QMP client.

The calling thread writes its command itself and waits. One daemon thread per client reads, and
hands each reply straight to its caller. stop, device state and cont make up the downtime, and QEMU
reads its monitor byte by byte at about 5 µs each: so commands are kept short, and may be announced.

A guard process can inherit the socket and keep talking to the VM when this process dies; so the
socket is only closed, never shut down.

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
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager

import msgspec

from stillframe.errors import InternalError, MachineError, UsageError, host_error
from stillframe.qmp.command import Command, QmpCommandError, command_body
from stillframe.qmp.command_writer import CommandWriter
from stillframe.qmp.connection import Address, address_text, open_socket
from stillframe.qmp.events import EventSubscribers, QmpEvent
from stillframe.qmp.framing import FramingError
from stillframe.qmp.greeting import negotiate, version_of
from stillframe.qmp.link import Link, Message
from stillframe.qmp.replies import as_int, as_map

logger = logging.getLogger(__name__)

_LOOK_REMEDY = "check whether the VM still runs"
_STUCK_REMEDY = f"its main loop may be stuck; {_LOOK_REMEDY}"
_JOIN_S = 2.0
_ANNOUNCE_S = 1.0

Waiter = queue.SimpleQueue[Message | None]
"""Delivers the reply to the waiting caller; None when the connection ends."""


class AddedFd(msgspec.Struct, frozen=True, kw_only=True):
    """A descriptor that the VMM now holds: its fd set, and its number in the VMM."""

    fdset_id: int
    fd: int

    @property
    def path(self) -> str:
        """The file name to use in QMP commands (QEMU ``util/osdep.c``: qemu_open)."""
        return f"/dev/fdset/{self.fdset_id}"


class QmpClient:
    """A connection to one QMP monitor. Made by ``connect``; close it, or use it in ``with``."""

    def __init__(self, address: Address, sock: socket.socket) -> None:
        self._address = address
        self._link = Link(sock)
        self._writer = CommandWriter(self._link)
        self._events = EventSubscribers()
        self._greeting: Mapping[str, object] = {}
        self._waiters: dict[object, Waiter] = {}
        self._state_lock = threading.Lock()
        self._fd_lock = threading.Lock()
        self._alive = False
        self._closed = False
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
            MachineError: nothing listens, no answer, or the server does not speak QMP.
        """
        deadline_s = time.monotonic() + timeout_s
        sock = open_socket(address, timeout_s)
        return cls.over(sock, address, timeout_s=deadline_s - time.monotonic())

    @classmethod
    def over(cls, sock: socket.socket, address: Address, *, timeout_s: float = 5.0) -> QmpClient:
        """Negotiate over a connected socket; the client owns it from now on.

        Args:
            address: how errors name the monitor.

        Raises:
            HostError: no descriptor is left. BusyError, MachineError: as ``connect``.
        """
        try:
            self = cls(address, sock)
        except OSError as error:
            sock.close()
            raise host_error(f"cannot connect to {address_text(address)}", error) from error
        try:
            self._greeting = negotiate(self._link, address, timeout_s)
        except BaseException:
            self.close()
            raise
        self._alive = True
        self._thread.start()
        return self

    # What the connection is

    @property
    def address(self) -> str | tuple[str, int]:
        """The address that ``connect`` was given."""
        return self._address

    @property
    def socket(self) -> socket.socket:
        """The connected socket: dup it for a guard process, but never read from it."""
        return self._link.socket

    def fileno(self) -> int:
        """The socket's descriptor number, -1 after ``close``."""
        return self._link.socket.fileno()

    @property
    def alive(self) -> bool:
        """Whether the connection is up, as far as the client knows."""
        return self._alive

    @property
    def version(self) -> tuple[int, int, int]:
        """The VMM's version from the greeting: (major, minor, micro)."""
        return version_of(self._greeting)

    # Commands

    def execute(
        self,
        command: str,
        arguments: Mapping[str, object] | None = None,
        *,
        timeout_s: float = 30.0,
        announce: Command | None = None,
    ) -> object:
        """Run one QMP command and return its ``return`` value. Callable from any thread.

        The command decides the guest's state afterwards.

        Args:
            announce: the likely next command; see :meth:`announce`. Its beginning is sent right
                behind this one, and a QEMU with out-of-band commands reads it meanwhile, in a
                separate thread (``monitor/qmp.c``: handle_qmp_command).

        Raises:
            QmpCommandError: the VMM answered with an error.
            MachineError: the connection was lost, or no answer came in time (the VMM may still run
                the command: ``guest_state`` is ``unknown``).
            UsageError: the arguments cannot be written as JSON.
        """
        if threading.get_ident() == self._thread.ident:
            raise InternalError("a QMP command was called for from an event callback")
        body = command_body(command, arguments)
        behind = None if announce is None else command_body(*announce)
        deadline_s = time.monotonic() + timeout_s
        waiter: Waiter = queue.SimpleQueue()
        with self._state_lock:
            if not self._alive:
                raise self._lost_error(command)
            # The id of a timed-out command stays reserved: its reply may still come.
            command_id = next(n for n in itertools.count() if n not in self._waiters)
            self._waiters[command_id] = waiter
        with self._losing(command):
            self._writer.write(body + b',"id":%d}' % command_id, deadline_s, behind=behind)
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
            error_class, description = (str(as_map(failure).get(key)) for key in ("class", "desc"))
            raise QmpCommandError(command, error_class, description)
        return reply.get("return")

    def hmp(self, command_line: str, *, timeout_s: float = 30.0) -> str:
        """Run a human monitor command and return its output; errors are part of that text.

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
        """Send the beginning of the likely next command; it does not run yet.

        ``execute`` of the same command and arguments then only has to complete it; any other
        command makes the VMM drop it first. The guest is not touched.

        Raises:
            MachineError: the connection was lost.
            UsageError: as ``execute``.
        """
        body = command_body(command, arguments)
        with self._losing(command):
            self._writer.announce(body, time.monotonic() + _ANNOUNCE_S)

    @contextmanager
    def _losing(self, command: str) -> Iterator[None]:
        """End the connection if sending fails."""
        try:
            yield
        except (OSError, ValueError) as error:
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
        if waiter is not None:  # else: its caller timed out
            waiter.put(message)

    def _end(self) -> None:
        """The connection ended: wake all waiters."""
        with self._state_lock:
            self._alive = False
            waiters = list(self._waiters.values())
        for waiter in waiters:
            waiter.put(None)

    # Descriptors

    @property
    def passes_fds(self) -> bool:
        """Whether the connection can pass descriptors (unix sockets only)."""
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
        # QEMU accepts descriptors with any byte, and ignores whitespace between commands.
        with self._losing("send_fd"):
            self._writer.write(b" ", time.monotonic() + timeout_s, (fd,))

    def add_fd(self, fd: int, *, opaque: str = "stillframe") -> AddedFd:
        """Hand a descriptor to the VMM as a new fd set. The caller may close its own copy.

        Raises:
            UsageError, MachineError: as ``send_fd`` and ``execute``.
        """
        with self._fd_lock:  # a descriptor and its add-fd belong together
            self.send_fd(fd)
            reply = as_map(self.execute("add-fd", {"opaque": opaque}))
        return AddedFd(fdset_id=as_int(reply.get("fdset-id")), fd=as_int(reply.get("fd")))

    def remove_fd(self, added: AddedFd) -> None:
        """Make the VMM close a descriptor given by ``add_fd``.

        QEMU closes it at once only while the guest runs. Otherwise it does so when, with the guest
        running again, another descriptor is removed or the monitor disconnects (QEMU
        ``monitor/fds.c``).

        Raises:
            MachineError: as ``execute``.
        """
        self.execute("remove-fd", {"fdset-id": added.fdset_id, "fd": added.fd})

    # Events

    def subscribe(self, callback: Callable[[QmpEvent], None]) -> Callable[[], None]:
        """Call ``callback`` for each event, in the client's thread; return a function that
        unsubscribes.

        The callback must be quick and must not run QMP commands.
        """
        return self._events.subscribe(callback)

    # The end

    def close(self) -> None:
        """Disconnect and end the thread; never raises, and does nothing the second time.

        The guest stays as it is; a process that inherited the socket keeps its connection. Do not
        call it from an event callback: the thread that runs callbacks cannot wait for its own end.
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

    def __exit__(self, *_error: object) -> None:
        self.close()
