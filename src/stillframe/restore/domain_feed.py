"""The pipe from which libvirt reads a save image, and its writer."""

from __future__ import annotations

import contextlib
import fcntl
import os
import select
import struct
import termios
import threading
from collections.abc import Callable, Iterator
from pathlib import Path

from stillframe.errors import StillframeError
from stillframe.restore.records import RunAs

_READS_HEAD_TWICE = 11_002_000
"""First libvirt that opens a save image once for its head, and once more to start the domain (11.2:
``src/qemu/qemu_saveimage.c``, qemuSaveImageGetMetadata)."""
_POLL_S = 0.002


class Feed:
    """The writer's end of the pipe.

    Its descriptor reads, too, so the pipe keeps its content while libvirt closes and opens it.
    """

    def __init__(self, fd: int, heads: int, given_up: threading.Event) -> None:
        self._fd = fd
        self._heads = heads
        self._given_up = given_up
        self._writable = select.poll()
        self._writable.register(fd, select.POLLOUT)

    def write_head(self, head: bytes) -> None:
        """Write the head as often as this libvirt reads it; otherwise as ``write``."""
        self.write(head * self._heads)

    def write(self, data: bytes) -> None:
        """Write all of the data.

        Raises:
            BrokenPipeError: the reader is gone.
        """
        rest = memoryview(data)
        while rest:
            if self._given_up.is_set():
                raise BrokenPipeError
            if self._writable.poll(_POLL_S * 1000):
                rest = rest[os.write(self._fd, rest) :]

    def wait_until_read(self) -> None:
        """Wait until all that was written into the pipe is read.

        Raises:
            BrokenPipeError: the reader is gone.
        """
        while struct.unpack("=i", fcntl.ioctl(self._fd, termios.FIONREAD, bytes(4)))[0]:
            if self._given_up.wait(_POLL_S):
                raise BrokenPipeError


class Feeder(threading.Thread):
    """The thread that writes a save image into a pipe for libvirt, and then for its QEMU.

    Args:
        pipe: its name, to be created. write: writes all of it; ``failure`` keeps its
            StillframeError. run_as: the user of that libvirt.
    """

    def __init__(
        self, pipe: Path, write: Callable[[Feed], None], run_as: RunAs | None = None
    ) -> None:
        super().__init__(name="stillframe-save-image", daemon=True)
        self._pipe = pipe
        self._write = write
        self._run_as = run_as
        self._heads = 1
        self._given_up = threading.Event()
        self.failure: StillframeError | None = None

    @contextlib.contextmanager
    def feeding(self, libvirt_version: int) -> Iterator[Path]:
        """Make the pipe and write to it, as long as the context lasts."""
        self._heads = 2 if libvirt_version >= _READS_HEAD_TWICE else 1
        os.mkfifo(self._pipe, 0o600)
        if self._run_as is not None:
            os.chown(self._pipe, self._run_as.uid, self._run_as.gid)
        self.start()
        try:
            yield self._pipe
        finally:
            self._given_up.set()
            self.join()
            self._pipe.unlink(missing_ok=True)

    def run(self) -> None:
        try:
            fd = os.open(self._pipe, os.O_RDWR | os.O_NONBLOCK | os.O_CLOEXEC)
            try:
                self._write(Feed(fd, self._heads, self._given_up))
                self._given_up.wait()
            finally:
                os.close(fd)
        except OSError:
            return  # the reader is gone; libvirt tells why
        except StillframeError as error:
            self.failure = error
