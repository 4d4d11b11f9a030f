"""Snapshot files on a local file system.

A file stays nameless until it is complete and synced: it is created with ``O_TMPFILE`` (open(2))
and named by linkat(2) of ``/proc/self/fd/N``. On file systems without O_TMPFILE it is a locked
hidden file, renamed at the end; hidden files of dead writers are swept.
"""

from __future__ import annotations

import errno
import fcntl
import os
import stat
import uuid
from contextlib import suppress
from pathlib import Path

from stillframe.errors import SinkError, UsageError
from stillframe.still.frames import BytesLike
from stillframe.still.sinks import aborting
from stillframe.store.backends.oserrors import sink_error
from stillframe.store.backends.write_behind import WriteBehind

_MODE = 0o600  # RAM holds secrets
_NO_UNNAMED_FILES = (errno.EOPNOTSUPP, errno.EISDIR, errno.EINVAL)
_HIDDEN_SUFFIX = ".still-part"


class LocalSink:
    """Writer of one file.

    Args:
        path: the file's name, which appears at :meth:`commit`. Its directory must exist.
        overwrite: whether to replace an existing file of that name.

    Raises:
        UsageError: the name is taken, or is not a file name.
        SinkError: the directory is missing or not writable.
    """

    def __init__(self, path: str | os.PathLike[str], *, overwrite: bool = False) -> None:
        self._path = Path(path)
        self._overwrite = overwrite
        self._state = "open"
        self._behind: WriteBehind | None = None
        self._hidden_name: str | None = None
        self._fd = -1
        if not self._path.name or os.fspath(path).endswith("/"):
            raise UsageError(f"{os.fspath(path)!r} is not a file name")
        try:
            self._directory_fd = os.open(
                self._path.parent, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC
            )
        except (OSError, ValueError) as error:
            raise _as_sink_error("open the directory of", self.description, error) from error
        try:
            self._check_name()
            self._open()
        except BaseException:
            self.abort()
            raise

    @property
    def description(self) -> str:
        return str(self._path)

    def write(self, data: BytesLike) -> None:
        """Append ``data``, which is written to disk in the background.

        Raises:
            SinkError: disk full, over quota, or an I/O error, possibly of an earlier write.
        """
        self._check_open()
        if self._behind is None:
            self._behind = WriteBehind(self._fd)
        try:
            self._behind.write(data)
        except OSError as error:
            raise _as_sink_error("write to", self.description, error) from error

    def write_at(self, offset_bytes: int, data: BytesLike) -> None:
        """Write ``data`` at an offset. Do not mix with :meth:`write`.

        Raises:
            SinkError: disk full, over quota, an I/O error.
        """
        self._check_open()
        rest = memoryview(data).cast("B")
        try:
            while rest:
                done = os.pwrite(self._fd, rest, offset_bytes)
                rest = rest[done:]
                offset_bytes += done
        except (OSError, OverflowError) as error:
            raise _as_sink_error("write to", self.description, error) from error

    def set_length(self, length_bytes: int) -> None:
        """Set the file's length; unwritten ranges are holes.

        Raises:
            SinkError: too large for the file system.
        """
        self._check_open()
        try:
            os.ftruncate(self._fd, length_bytes)
        except (OSError, OverflowError) as error:
            raise _as_sink_error("write to", self.description, error) from error

    def commit(self) -> None:
        """Sync the file, give it its name, sync the directory.

        Raises:
            SinkError: it failed. The name is as it was before, unless the final sync failed after a
                file had been replaced.
        """
        self._check_open()
        try:
            if self._behind is not None:
                self._behind.finish()
            os.fsync(self._fd)
            if self._hidden_name is not None:
                self._rename_hidden(self._hidden_name)
            elif self._overwrite:
                hidden = _new_hidden_name()
                self._link(hidden)
                self._hidden_name = hidden
                self._rename_hidden(hidden)
            else:
                self._link(self._path.name)
            self._sync_directory()
            self._state = "committed"
        except FileExistsError as error:
            raise SinkError(
                f"cannot name the snapshot {self.description}",
                why="a file of that name was created meanwhile",
                remedy="choose another name",
            ) from error
        except OSError as error:
            raise sink_error("finish", self.description, error) from error
        finally:
            self.abort()
            self._close()

    def abort(self) -> None:
        """Discard the file unless it was committed."""
        if self._state == "open":
            self._state = "aborted"
            if self._hidden_name is not None:
                with suppress(OSError):
                    os.unlink(self._hidden_name, dir_fd=self._directory_fd)
            self._close()

    def _check_open(self) -> None:
        if self._state != "open":
            raise UsageError(f"{self.description} is already {self._state}")

    def _check_name(self) -> None:
        try:
            found = os.stat(self._path.name, dir_fd=self._directory_fd, follow_symlinks=False)
        except FileNotFoundError:
            return
        except OSError as error:
            raise sink_error("look at", self.description, error) from error
        if not stat.S_ISREG(found.st_mode):
            raise UsageError(
                f"{self.description} exists and is not a regular file",
                remedy="choose another name, or - for standard output",
            )
        if not self._overwrite:
            raise UsageError(
                f"{self.description} exists already",
                remedy="choose another name, remove it, or allow overwriting (--force)",
            )

    def _open(self) -> None:
        with suppress(OSError):
            sweep_leftovers(self._directory_fd)
        try:
            self._fd = _open_unnamed(self._directory_fd)
            self._prepare()
            return
        except OSError as error:
            if error.errno not in _NO_UNNAMED_FILES:
                raise sink_error("create", self.description, error) from error
        try:
            while not self._open_hidden():
                pass
        except OSError as error:
            raise sink_error("create", self.description, error) from error

    def _open_hidden(self) -> bool:
        """Create a hidden file; return False if a sweep took it before it was locked."""
        hidden = _new_hidden_name()
        flags = os.O_RDWR | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC
        self._fd = os.open(hidden, flags, _MODE, dir_fd=self._directory_fd)
        self._hidden_name = hidden
        if self._prepare() and os.fstat(self._fd).st_nlink:
            return True
        os.close(self._fd)
        self._fd = -1
        self._hidden_name = None
        return False

    def _prepare(self) -> bool:
        """Set the mode regardless of the umask, and lock the file; return False if a sweep has the
        lock."""
        os.fchmod(self._fd, _MODE)
        try:
            fcntl.flock(self._fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            return False
        except OSError:  # without locks, nothing is swept either
            pass
        return True

    def _link(self, name: str) -> None:
        # With dir_fd, os.link calls linkat(2) with AT_SYMLINK_FOLLOW, which follows /proc's link.
        os.link(
            f"/proc/self/fd/{self._fd}", name, dst_dir_fd=self._directory_fd, follow_symlinks=True
        )

    def _rename_hidden(self, hidden: str) -> None:
        name, directory = self._path.name, self._directory_fd
        if self._overwrite:
            os.rename(hidden, name, src_dir_fd=directory, dst_dir_fd=directory)
        else:
            # link(2) refuses to replace a file; rename(2) would not.
            os.link(hidden, name, src_dir_fd=directory, dst_dir_fd=directory)
            os.unlink(hidden, dir_fd=directory)
        self._hidden_name = None

    def _sync_directory(self) -> None:
        try:
            os.fsync(self._directory_fd)
        except OSError as error:
            if error.errno in (errno.EINVAL, errno.EOPNOTSUPP):  # not supported everywhere
                return
            if not self._overwrite:  # a replaced file cannot be restored
                with suppress(OSError):
                    os.unlink(self._path.name, dir_fd=self._directory_fd)
            raise

    def _close(self) -> None:
        if self._behind is not None:
            self._behind.end()
            self._behind = None
        for fd in (self._fd, self._directory_fd):
            if fd >= 0:
                with suppress(OSError):
                    os.close(fd)
        self._fd = self._directory_fd = -1


def write_file(path: str | os.PathLike[str], content: bytes, *, overwrite: bool = False) -> None:
    """Write a file of mode 0600, whole or not at all.

    Raises:
        UsageError: it exists. SinkError: it cannot be written.
    """
    sink = LocalSink(path, overwrite=overwrite)
    with aborting(sink):
        sink.write(content)
        sink.commit()


def _open_unnamed(directory_fd: int) -> int:
    return os.open(".", os.O_RDWR | os.O_TMPFILE | os.O_CLOEXEC, _MODE, dir_fd=directory_fd)


def _new_hidden_name() -> str:
    return f".{uuid.uuid4().hex}{_HIDDEN_SUFFIX}"


def sweep_leftovers(directory_fd: int) -> int:
    """Remove dead writers' hidden files, which no process has locked; return how many."""
    removed = 0
    for name in os.listdir(directory_fd):
        if not name.startswith(".") or not name.endswith(_HIDDEN_SUFFIX):
            continue
        with suppress(OSError):
            fd = os.open(name, os.O_RDWR | os.O_NOFOLLOW | os.O_CLOEXEC, dir_fd=directory_fd)
            try:
                fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
                os.unlink(name, dir_fd=directory_fd)
                removed += 1
            finally:
                os.close(fd)
    return removed


def _as_sink_error(doing: str, description: str, error: Exception) -> SinkError:
    if isinstance(error, OSError):
        return sink_error(doing, description, error)
    return SinkError(f"cannot {doing} {description!r}", why=str(error))
