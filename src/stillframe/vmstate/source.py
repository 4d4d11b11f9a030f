"""Buffered reads from an untrusted stream."""

from __future__ import annotations

from struct import Struct
from typing import Protocol, cast

from stillframe.errors import DataError

CHUNK_BYTES = 1 << 20

_U16 = Struct(">H")
_U32 = Struct(">I")
_U64 = Struct(">Q")


class Source(Protocol):
    """The stream's origin: a binary file, a pipe, a decompressor.

    Mapped-ram streams also need ``seek`` and ``tell``, and a ``seekable()`` that returns true.
    """

    def read(self, size: int, /) -> bytes:
        """Return up to ``size`` bytes; none at the end."""
        ...


class _SeekableSource(Source, Protocol):
    def seek(self, offset: int, /) -> int: ...

    def tell(self) -> int: ...


class StreamSource:
    """A reader of bytes and integers from a source, which tracks the offset for errors.

    ``buffer`` and ``position`` are open to the RAM loop, which is too hot for calls.

    Args:
        live: the writer may wait for an answer before it sends more, so never wait for anything
            beyond the next record.
    """

    def __init__(self, source: Source, *, live: bool = False) -> None:
        self._source = source
        self._live = live
        self.buffer = b""
        self.position = 0
        self._buffer_offset = 0

    @property
    def offset(self) -> int:
        """Bytes consumed so far."""
        return self._buffer_offset + self.position

    @property
    def available(self) -> int:
        """Unread bytes in the buffer."""
        return len(self.buffer) - self.position

    def prefetch(self, size: int) -> bool:
        """Try to have ``size`` bytes in the buffer; return False if the source ends first."""
        missing = size - self.available
        if missing <= 0:
            return True
        parts = [self.buffer[self.position :]]
        while missing > 0:
            part = self._read(max(missing, CHUNK_BYTES))
            if not part:
                break
            parts.append(part)
            missing -= len(part)
        self._buffer_offset += self.position
        self.position = 0
        self.buffer = b"".join(parts)
        return missing <= 0

    def prefetch_if_stored(self, size: int) -> bool:
        """Call ``prefetch``, which allows longer runs, unless the source is a live writer."""
        return not self._live and self.prefetch(size)

    def _read(self, size: int) -> bytes:
        try:
            return self._source.read(size)
        except (OSError, EOFError) as error:
            raise DataError(
                "the stream cannot be read", why=str(error), offset_bytes=self.offset
            ) from error

    def need(self, size: int, what: str) -> None:
        """Have ``size`` bytes in the buffer.

        Raises:
            DataError: the stream ends first.
        """
        if not self.prefetch(size):
            raise DataError(
                f"the stream is truncated in {what}",
                why=f"{size} bytes must follow, there are {self.available}",
                offset_bytes=self.offset,
            )

    def take(self, size: int, what: str) -> bytes:
        """Consume and return exactly ``size`` bytes."""
        self.need(size, what)
        start = self.position
        self.position = start + size
        return self.buffer[start : start + size]

    def peek(self) -> int | None:
        """Return the next byte, or None at the end of the stream, and leave it there."""
        if not self.prefetch(1):
            return None
        return self.buffer[self.position]

    def u8(self, what: str) -> int:
        return self.take(1, what)[0]

    def u16(self, what: str) -> int:
        return int(_U16.unpack(self.take(2, what))[0])

    def u32(self, what: str) -> int:
        return int(_U32.unpack(self.take(4, what))[0])

    def u64(self, what: str) -> int:
        return int(_U64.unpack(self.take(8, what))[0])

    def name(self, what: str) -> str:
        """Read a length-prefixed name: 1 to 255 printable ASCII characters."""
        return self.text(self.u8(what), what)

    def text(self, size: int, what: str) -> str:
        """Read ``size`` printable ASCII characters."""
        start = self.offset
        raw = self.take(size, what)
        if not raw or not raw.isascii() or not raw.decode("ascii").isprintable():
            raise DataError(f"{what} is not a name", why=f"found {raw[:40]!r}", offset_bytes=start)
        return raw.decode("ascii")

    def rest(self, limit_bytes: int, what: str) -> bytes:
        """Read everything up to the end of the source.

        Raises:
            DataError: that is more than ``limit_bytes``.
        """
        start = self.offset
        parts = [self.buffer[self.position :]]
        total = len(parts[0])
        while total <= limit_bytes:
            part = self._read(CHUNK_BYTES)
            if not part:
                break
            parts.append(part)
            total += len(part)
        if total > limit_bytes:
            raise DataError(
                f"{what} is larger than {limit_bytes} bytes",
                remedy="raise the reader's limit if the VM really has this much",
                offset_bytes=start,
            )
        self._buffer_offset = start + total
        self.buffer = b""
        self.position = 0
        return b"".join(parts)

    def seekable(self) -> bool:
        """Return whether :meth:`seek` works."""
        probe = getattr(self._source, "seekable", None)
        return callable(probe) and bool(probe())

    def file_position(self) -> int:
        """Return the absolute position, in the source's file, of the next byte to take."""
        return cast(_SeekableSource, self._source).tell() - self.available

    def seek(self, file_offset: int, *, stream_offset: int) -> None:
        """Continue at an absolute position in the source's file.

        ``stream_offset``: the value of :attr:`offset` there.
        """
        try:
            cast(_SeekableSource, self._source).seek(file_offset)
        except OSError as error:
            raise DataError(
                "the stream cannot be read", why=str(error), offset_bytes=self.offset
            ) from error
        self.buffer = b""
        self.position = 0
        self._buffer_offset = stream_offset
