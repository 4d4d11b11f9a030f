"""Where a snapshot goes, and what it is read from: the interfaces of whatever moves the bytes."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Protocol, runtime_checkable

from stillframe.still.frames import BytesLike


@runtime_checkable
class Sink(Protocol):
    """The destination of a snapshot: takes bytes in order, and gets its name only at the end.

    For one thread at a time. After :meth:`commit` or :meth:`abort` nothing more may be written;
    :meth:`abort` may be called at any time and repeatedly, and does nothing after a commit.
    """

    @property
    def description(self) -> str:
        """Its name in error messages, such as its path."""

    def write(self, data: BytesLike) -> None:
        """Take all of ``data``.

        Raises:
            SinkError: full, not permitted, closed by the other side.
        """

    def commit(self) -> None:
        """Make the written bytes durable and give them their name.

        Raises:
            SinkError: it failed, and nothing was left behind.
        """

    def abort(self) -> None:
        """Leave nothing behind. Never raises."""


@contextmanager
def aborting(sink: Sink) -> Iterator[None]:
    """Leave nothing behind unless the sink was committed."""
    try:
        yield
    finally:
        sink.abort()


@runtime_checkable
class SparseSink(Sink, Protocol):
    """A sink that takes bytes at any offset; unwritten ranges read as zeroes."""

    def write_at(self, offset_bytes: int, data: BytesLike) -> None:
        """Write all of ``data`` at an offset. Do not mix with :meth:`write`.

        Raises:
            SinkError: full, not permitted.
        """

    def set_length(self, length_bytes: int) -> None:
        """Set the total length, which may exceed the last byte written.

        Raises:
            SinkError: full, too large for the file system.
        """


@runtime_checkable
class Source(Protocol):
    """The origin of a snapshot's bytes. Safe to read from several threads."""

    @property
    def description(self) -> str:
        """Its name in error messages, such as its path."""

    @property
    def size_bytes(self) -> int:
        """Length at the time of opening."""

    @property
    def owner_uid(self) -> int | None:
        """User id of its owner; None if it has none."""

    @property
    def others_may_write(self) -> bool:
        """Whether users other than the owner may change it."""

    def read_at(self, offset_bytes: int, length_bytes: int) -> bytes:
        """Return exactly ``length_bytes`` bytes.

        Raises:
            DataError: there are fewer (the file was truncated meanwhile, for instance), or the
                medium cannot be read.
        """

    def close(self) -> None:
        """Close it. Never raises; may be called repeatedly."""
