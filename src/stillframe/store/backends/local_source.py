"""A source: a snapshot file on a local file system."""

from __future__ import annotations

import os
import stat
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from stillframe.errors import DataError, HostError, NotFoundError, UnreadableError, UsageError
from stillframe.vmstate.source import Source

_AHEAD_BYTES = 8 << 20
"""The limit: a guest's fault reads out of order and queues behind the read-ahead."""
_PIECE_BYTES = 256 << 10
"""Linux caps what one call reads ahead (``mm/readahead.c``: force_page_cache_ra)."""


class LocalSource:
    """Reader of one file. Never maps it: truncation would kill the reader with SIGBUS.

    While reads are sequential, also across threads, the next part is prefetched from the medium.

    Args:
        name: the file's name in messages, if not its path.

    Raises:
        NotFoundError: no such file.
        UsageError: not a regular file.
        HostError: not permitted, or not readable.
    """

    def __init__(self, path: str | os.PathLike[str], *, name: str | None = None) -> None:
        self._name = name if name is not None else str(Path(path))
        self._fd = -1
        self._last_end = self._asked_to = -1
        try:
            # Non-blocking, so that a named pipe is refused instead of blocking the open.
            self._fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC | os.O_NOCTTY | os.O_NONBLOCK)
            self._status = os.fstat(self._fd)
        except (FileNotFoundError, NotADirectoryError) as error:
            raise NotFoundError(f"there is no file {self.description}") from error
        except (OSError, ValueError) as error:
            self.close()
            raise HostError(
                f"cannot read {self.description!r}",
                why=(error.strerror if isinstance(error, OSError) else None) or str(error),
            ) from error
        if not stat.S_ISREG(self._status.st_mode):
            self.close()
            raise UsageError(f"{self.description} is not a regular file")

    @property
    def description(self) -> str:
        return self._name

    @property
    def size_bytes(self) -> int:
        return self._status.st_size

    @property
    def owner_uid(self) -> int | None:
        return self._status.st_uid

    @property
    def others_may_write(self) -> bool:
        return bool(self._status.st_mode & (stat.S_IWGRP | stat.S_IWOTH))

    @property
    def others_may_read(self) -> bool:
        """Whether the file's mode lets everybody read it."""
        return bool(self._status.st_mode & stat.S_IROTH)

    def read_at(self, offset_bytes: int, length_bytes: int) -> bytes:
        """Return exactly ``length_bytes`` bytes.

        Raises:
            DataError: the file is shorter. UnreadableError: the medium fails or is gone.
        """
        if offset_bytes < 0 or length_bytes < 0:
            raise DataError(f"{length_bytes} bytes at {offset_bytes} cannot be read")
        self._read_ahead(offset_bytes, offset_bytes + length_bytes)
        parts: list[bytes] = []
        missing = length_bytes
        try:
            while missing > 0:
                part = os.pread(self._fd, missing, offset_bytes + length_bytes - missing)
                if not part:
                    raise DataError(
                        f"{self.description} is truncated",
                        why=f"{missing} bytes are missing",
                        offset_bytes=offset_bytes + length_bytes - missing,
                    )
                parts.append(part)
                missing -= len(part)
        except OSError as error:
            raise UnreadableError(
                f"cannot read {self.description}", why=str(error), offset_bytes=offset_bytes
            ) from error
        except OverflowError as error:
            raise DataError(
                f"cannot read {self.description}", why=str(error), offset_bytes=offset_bytes
            ) from error
        return parts[0] if len(parts) == 1 else b"".join(parts)

    def _read_ahead(self, start: int, end: int) -> None:
        goes_on, self._last_end = start == self._last_end, end
        if not self._asked_to - _AHEAD_BYTES <= start <= self._asked_to:
            if not goes_on:
                return
            self._asked_to = end
        first = max(end, self._asked_to)
        self._asked_to = max(first, min(end + _AHEAD_BYTES, self.size_bytes))
        with suppress(OSError, OverflowError):
            for offset in range(first, self._asked_to, _PIECE_BYTES):
                os.posix_fadvise(self._fd, offset, _PIECE_BYTES, os.POSIX_FADV_WILLNEED)

    def close(self) -> None:
        """Close the file."""
        if self._fd >= 0:
            with suppress(OSError):
                os.close(self._fd)
            self._fd = -1


@contextmanager
def open_stream(source: str | os.PathLike[str] | Source) -> Iterator[Source]:
    """Open a file or a named pipe for reading; yield an open stream as it is and leave it open.

    Raises:
        NotFoundError: no such file. UsageError: a directory. HostError: not permitted.
    """
    if not isinstance(source, str | os.PathLike):
        yield source
        return
    try:
        stream = Path(source).open("rb")  # noqa: SIM115 - closed below
    except (FileNotFoundError, NotADirectoryError) as error:
        raise NotFoundError(f"there is no file {source}") from error
    except IsADirectoryError as error:
        raise UsageError(f"{source} is a directory", remedy="name a file") from error
    except (OSError, ValueError) as error:
        why = error.strerror if isinstance(error, OSError) else str(error)
        raise HostError(f"cannot read {source}", why=why) from error
    with stream:
        yield stream
