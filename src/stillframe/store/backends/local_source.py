"""Reads a snapshot file on a local file system."""

from __future__ import annotations

import os
import stat
from contextlib import suppress
from pathlib import Path

from stillframe.errors import DataError, HostError, NotFoundError, UsageError


class LocalSource:
    """Reads one file. Never mapped: a file that shrinks would kill the reader with SIGBUS.

    Args:
        name: what messages call it, if not by its path.

    Raises:
        NotFoundError: no such file.
        UsageError: not a regular file.
        HostError: not permitted, or not readable.
    """

    def __init__(self, path: str | os.PathLike[str], *, name: str | None = None) -> None:
        self._name = name if name is not None else str(Path(path))
        self._fd = -1
        try:
            # Not blocking, so that a named pipe is refused rather than waited for.
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

    def read_at(self, offset_bytes: int, length_bytes: int) -> bytes:
        """Exactly so many bytes.

        Raises:
            DataError: the file has fewer, or the medium fails.
        """
        if offset_bytes < 0 or length_bytes < 0:
            raise DataError(f"{length_bytes} bytes at {offset_bytes} cannot be read")
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
        except (OSError, OverflowError) as error:
            raise DataError(
                f"cannot read {self.description}", why=str(error), offset_bytes=offset_bytes
            ) from error
        return parts[0] if len(parts) == 1 else b"".join(parts)

    def close(self) -> None:
        """Close the file."""
        if self._fd >= 0:
            with suppress(OSError):
                os.close(self._fd)
            self._fd = -1
