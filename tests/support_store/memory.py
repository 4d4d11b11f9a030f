"""A sink and a source in memory, for tests and for small things."""

from __future__ import annotations

from stillframe.errors import DataError, UsageError
from stillframe.still.frames import BytesLike


class MemorySink:
    """Collects the bytes; they are to be had after :meth:`commit` only."""

    description = "memory"

    def __init__(self) -> None:
        self._written = bytearray()
        self._state = "open"

    def write(self, data: BytesLike) -> None:
        """Take ``data``.

        Raises:
            UsageError: after commit or abort.
        """
        self._check_open()
        self._written += data

    def commit(self) -> None:
        """Make the bytes available.

        Raises:
            UsageError: after commit or abort.
        """
        self._check_open()
        self._state = "committed"

    def abort(self) -> None:
        """Forget the bytes, unless they were committed."""
        if self._state == "open":
            self._state = "aborted"
            self._written.clear()

    @property
    def content(self) -> bytes:
        """What was written.

        Raises:
            UsageError: before commit.
        """
        if self._state != "committed":
            raise UsageError(f"this sink is {self._state}, not committed")
        return bytes(self._written)

    def _check_open(self) -> None:
        if self._state != "open":
            raise UsageError(f"this sink is already {self._state}")


class MemorySource:
    """Reads from bytes."""

    description = "memory"
    owner_uid: int | None = None
    others_may_write = False

    def __init__(self, content: BytesLike) -> None:
        self._content = bytes(content)

    @property
    def size_bytes(self) -> int:
        return len(self._content)

    def read_at(self, offset_bytes: int, length_bytes: int) -> bytes:
        """Exactly so many bytes.

        Raises:
            DataError: there are fewer.
        """
        if offset_bytes < 0 or length_bytes < 0 or offset_bytes + length_bytes > self.size_bytes:
            raise DataError(
                f"{length_bytes} bytes are missing in memory", offset_bytes=offset_bytes
            )
        return self._content[offset_bytes : offset_bytes + length_bytes]

    def close(self) -> None:
        """Nothing to let go of."""
