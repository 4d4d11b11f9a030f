"""One client of a QMP server: its socket, and the thread that reads and runs its commands."""

from __future__ import annotations

import logging
import os
import select
import socket
import threading
import time
from array import array
from collections.abc import Callable

from stillframe.board.monitor.command_set import CommandTable
from stillframe.board.monitor.descriptors import ClientDescriptors, FdSets
from stillframe.board.monitor.outbox import Outbox
from stillframe.board.monitor.session import Session
from stillframe.qmp.json_stream import JsonStream

logger = logging.getLogger(__name__)

_READ_BYTES = 64 << 10
_FD_BYTES = array("i").itemsize
_FDS_MAX = 16
"""QEMU ``chardev/char-socket.c``: TCP_MAX_FDS."""
_LAST_WORDS_S = 1.0


class ServerClient:
    """A connected client. It ends when it hangs up, is dropped, or by ``stop``.

    Args:
        sock: its socket, which this object owns.
        commands: the commands it may use.
        sets: the server's descriptor sets.
        greeting: the first message to it.
        ended: called once when the client is gone, in its thread, or in the accepting thread if
            its own could not start.
    """

    def __init__(
        self,
        sock: socket.socket,
        commands: CommandTable,
        sets: FdSets,
        greeting: bytes,
        ended: Callable[[ServerClient], None],
    ) -> None:
        sock.setblocking(False)
        self._socket = sock
        self._fds = ClientDescriptors(sets)
        self._session = Session(commands, self._fds)
        self._stream = JsonStream()
        self._outbox = Outbox(sock)
        self._greeting = greeting
        self._ended = ended
        self._stopping = False
        self._wake_fd = os.eventfd(0, os.EFD_CLOEXEC | os.EFD_NONBLOCK)
        self._wake_lock = threading.Lock()
        self._thread = threading.Thread(target=self._run, name="qmp client", daemon=True)

    def start(self) -> None:
        """Send the greeting and serve commands."""
        self._thread.start()

    def put_event(self, message: bytes) -> None:
        """Send an event if the client has negotiated. From any thread; never blocks."""
        if self._session.negotiated:
            self._outbox.put_event(message)
            if self._outbox.pending or self._outbox.dead:
                self._wake()

    def stop(self) -> None:
        """Stop after the current command; pending replies are still sent."""
        self._stopping = True
        self._wake()

    def join(self, deadline_s: float) -> None:
        """Wait for its end until ``deadline_s`` (``time.monotonic``), except in its own thread."""
        if self._thread.ident != threading.get_ident():
            self._thread.join(max(0.0, deadline_s - time.monotonic()))

    # Its thread

    def _run(self) -> None:
        try:
            self._outbox.put(self._greeting)
            while not self._over():
                if self._poll(read=True) and not self._take():
                    break
            self._say_last_words()
        except OSError as error:
            logger.debug("a client is gone: %s", error)
        finally:
            self.hang_up()

    def _over(self) -> bool:
        return self._stopping or self._outbox.dead

    def _poll(self, *, read: bool, timeout_s: float | None = None) -> bool:
        """Wait for activity and flush the outbox; return whether input is ready.

        Args:
            read: whether to wait for input too.
        """
        poller = select.poll()
        wanted = (select.POLLIN if read else 0) | (select.POLLOUT if self._outbox.pending else 0)
        poller.register(self._socket, wanted)
        poller.register(self._wake_fd, select.POLLIN)
        ready = dict(poller.poll(None if timeout_s is None else timeout_s * 1e3))
        if self._wake_fd in ready:
            os.eventfd_read(self._wake_fd)
        got = ready.get(self._socket.fileno(), 0)
        if got & ~select.POLLIN:
            self._outbox.flush()
        return read and bool(got & ~select.POLLOUT)

    def _take(self) -> bool:
        """Read and run commands; return False when the client hung up, or must end."""
        try:
            data, ancillary, _flags, _address = self._socket.recvmsg(
                _READ_BYTES, socket.CMSG_SPACE(_FDS_MAX * _FD_BYTES), socket.MSG_CMSG_CLOEXEC
            )
        except (BlockingIOError, InterruptedError):
            return True
        for level, kind, raw in ancillary:
            if (level, kind) == (socket.SOL_SOCKET, socket.SCM_RIGHTS):
                self._fds.receive(array("i", raw[: len(raw) // _FD_BYTES * _FD_BYTES]))
        if not data:
            return False
        for message in self._stream.feed(data):
            self._outbox.put(self._session.answer(message))
            # Run no more commands of a client that does not read its replies.
            while self._outbox.congested and not self._over():
                self._poll(read=False)
            if self._over():
                return False
        return True

    def _say_last_words(self) -> None:
        deadline_s = time.monotonic() + _LAST_WORDS_S
        while self._outbox.pending and not self._outbox.dead:
            remaining_s = deadline_s - time.monotonic()
            if remaining_s <= 0:
                return
            self._poll(read=False, timeout_s=remaining_s)

    def hang_up(self) -> None:
        """Release everything. Called in the client's thread, or if that could not start."""
        self._outbox.give_up()
        self._fds.close()
        self._socket.close()
        with self._wake_lock:
            os.close(self._wake_fd)
            self._wake_fd = -1
        self._ended(self)

    def _wake(self) -> None:
        with self._wake_lock:
            if self._wake_fd >= 0:
                os.eventfd_write(self._wake_fd, 1)
