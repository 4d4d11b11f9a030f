"""The other end of the UART's line.

One thread moves bytes between the UART and a channel. Its buffer has its own lock, since the UART
sends with the board lock held and the channel may be slow.
"""

from __future__ import annotations

import contextlib
import os
import select
import threading

from stillframe.board.hardware.serial_channels import Channel
from stillframe.board.hardware.uart import Uart

_BUFFER_BYTES = 64 << 10
_WRITE_BYTES = 4096
"""A pipe that is ready takes this much without blocking (pipe(7): PIPE_BUF)."""
_FLUSH_S = 1.0


class SerialPort:
    """Moves bytes between a UART and a channel. While the board is stopped, nothing comes in; what
    the guest has sent still goes out, since the guest has seen it go."""

    def __init__(self, lock: threading.RLock, uart: Uart, channel: Channel) -> None:
        self._board_lock = lock
        self._uart = uart
        self._channel = channel
        self._buffer_lock = threading.Lock()
        self._buffer = bytearray()
        self._full = False
        self._arrived = b""
        self._running = False
        self._quit = False
        self._wake_fd = os.eventfd(0, os.EFD_CLOEXEC | os.EFD_NONBLOCK)
        self._thread = threading.Thread(target=self._loop, name="stillframe-serial", daemon=True)
        uart.connect(self)

    def start_thread(self) -> None:
        self._thread.start()

    def resume(self) -> None:
        """Let bytes in from now on. With the board lock held."""
        self._running = True
        self._uart.can_send()
        if self._arrived:
            self._wake()

    def pause(self) -> None:
        """Let no more bytes in. With the board lock held."""
        self._running = False

    def close(self) -> None:
        """Write what is left, and end. Without the board lock.

        What the reader does not take within a second may be lost.
        """
        self._quit = True
        if self._thread.ident is not None:
            self._wake()
            self._thread.join(_FLUSH_S)
            if self._thread.is_alive():
                # The thread hangs in a write; leave it its descriptors.
                return
        self._channel.close()
        os.close(self._wake_fd)

    # For the UART, with the board lock held

    def send(self, data: bytes) -> int:
        with self._buffer_lock:
            room = _BUFFER_BYTES - len(self._buffer)
            was_empty = not self._buffer
            self._buffer += data[:room]
            self._full = room < len(data)
        if was_empty:
            self._wake()
        return min(room, len(data))

    def may_receive(self) -> None:
        if self._arrived:
            self._wake()

    # The thread

    def _wake(self) -> None:
        with contextlib.suppress(BlockingIOError):
            os.eventfd_write(self._wake_fd, 1)

    def _loop(self) -> None:
        while not (self._quit and not self._buffer):
            events = self._wait()
            if events.get(self._wake_fd, 0):
                with contextlib.suppress(BlockingIOError):
                    os.eventfd_read(self._wake_fd)
            output_fd = self._channel.output_fd()
            if self._buffer and (output_fd is None or events.get(output_fd, 0)):
                self._write()
            input_fd = self._channel.input_fd()
            if input_fd is not None and events.get(input_fd, 0) and not self._arrived:
                self._arrived = self._channel.read()
            if self._arrived:
                self._hand_in()

    def _wait(self) -> dict[int, int]:
        poll = select.poll()
        wanted = {self._wake_fd: select.POLLIN}
        input_fd, output_fd = self._channel.input_fd(), self._channel.output_fd()
        if input_fd is not None and not self._arrived:
            wanted[input_fd] = select.POLLIN
        if output_fd is not None and self._buffer:
            wanted[output_fd] = wanted.get(output_fd, 0) | select.POLLOUT
        for fd, mask in wanted.items():
            poll.register(fd, mask)
        nobody = output_fd is None and self._buffer
        return dict(poll.poll(0 if nobody else None))

    def _write(self) -> None:
        with self._buffer_lock:
            data = bytes(self._buffer[:_WRITE_BYTES])
        written = self._channel.write(data)
        with self._buffer_lock:
            del self._buffer[:written]
            was_full, self._full = self._full, False
        if was_full:
            with self._board_lock:
                # While the board is stopped, its state may be saved; ``resume`` sends the rest.
                if self._running:
                    self._uart.can_send()

    def _hand_in(self) -> None:
        with self._board_lock:
            if self._running:
                room = max(self._uart.receive_room(), 0)
                taken, self._arrived = self._arrived[:room], self._arrived[room:]
                if taken:
                    self._uart.receive(taken)
