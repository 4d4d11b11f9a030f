"""Where a snapshot goes, and what it is read from: whatever moves the bytes."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Protocol, runtime_checkable

from stillframe.still.frames import BytesLike


@runtime_checkable
class Sink(Protocol):
    """Where a snapshot goes: bytes in order, and a name only at the end.

    One thread at a time. After :meth:`commit` or :meth:`abort` nothing more may be written;
    :meth:`abort` may be called at any time and more than once, and does nothing after a commit.
    """

    @property
    def description(self) -> str:
        """What error messages call it, such as its path."""

    def write(self, data: BytesLike) -> None:
        """Take all of ``data``.

        Raises:
            SinkError: full, not permitted, closed by the other side.
        """

    def commit(self) -> None:
        """Make what was written durable and give it its name.

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
    """A sink that takes bytes at any place; what is never written reads as zeroes."""

    def write_at(self, offset_bytes: int, data: BytesLike) -> None:
        """Put all of ``data`` at a place. Not to be mixed with :meth:`write`.

        Raises:
            SinkError: full, not permitted.
        """

    def set_length(self, length_bytes: int) -> None:
        """Set the whole length, also beyond the last byte written.

        Raises:
            SinkError: full, too large for the file system.
        """


@runtime_checkable
class Source(Protocol):
    """Where a snapshot is read from. Safe to read from several threads."""

    @property
    def description(self) -> str:
        """What error messages call it, such as its path."""

    @property
    def size_bytes(self) -> int:
        """Length when it was opened."""

    @property
    def owner_uid(self) -> int | None:
        """User id of its owner, or None where there is none."""

    @property
    def others_may_write(self) -> bool:
        """Whether users other than the owner may change it."""

    def read_at(self, offset_bytes: int, length_bytes: int) -> bytes:
        """Exactly so many bytes.

        Raises:
            DataError: there are fewer (the file was truncated meanwhile, for instance), or the
                medium cannot be read.
        """

    def close(self) -> None:
        """Let go of it. Never raises; may be called more than once."""
