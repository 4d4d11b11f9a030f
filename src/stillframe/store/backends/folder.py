"""A store's objects as files in a folder of a local file system."""

from __future__ import annotations

import contextlib
import os
from pathlib import Path

from stillframe.errors import DataError, HostError, SinkError, UsageError
from stillframe.still.sinks import Sink
from stillframe.store.backends.local import LocalSink
from stillframe.store.backends.local_source import LocalSource
from stillframe.store.backends.objects import StoredObject
from stillframe.store.backends.oserrors import sink_error

_SMALL_MAX_BYTES = 1 << 24


class LocalFolder:
    """A folder; an object's key is its path below it. Subfolders are created as needed.

    Files whose names begin with a dot are not objects: on file systems without O_TMPFILE, writers
    keep unfinished files under such names.
    """

    def __init__(self, folder: str | os.PathLike[str]) -> None:
        self._folder = Path(folder).absolute()

    @property
    def description(self) -> str:
        return str(self._folder)

    def create(self, key: str, data: bytes) -> bool:
        path = self.path(key)
        if os.path.lexists(path):
            return False
        try:
            sink = self.sink(key)
            sink.write(data)
            sink.commit()
        except (SinkError, UsageError) as error:
            if isinstance(error, UsageError) or isinstance(error.__cause__, FileExistsError):
                return False  # another writer was first
            raise
        return True

    def read(self, key: str) -> bytes:
        with contextlib.closing(self.open(key)) as source:
            if source.size_bytes > _SMALL_MAX_BYTES:
                raise DataError(f"{source.description} has {source.size_bytes} bytes")
            return source.read_at(0, source.size_bytes)

    def open(self, key: str) -> LocalSource:
        return LocalSource(self.path(key))

    def listing(self, prefix: str) -> list[StoredObject]:
        folder = prefix.rpartition("/")[0]
        try:
            found = self._walk(self._folder / folder, f"{folder}/" if folder else "")
        except OSError as error:
            raise HostError(f"cannot list {self._folder / folder}", why=error.strerror) from error
        return sorted(one for one in found if one.key.startswith(prefix))

    def _walk(self, folder: Path, prefix: str) -> list[StoredObject]:
        found: list[StoredObject] = []
        try:
            names = list(os.scandir(folder))
        except FileNotFoundError:
            return found
        for entry in names:
            if entry.name.startswith("."):
                continue
            with contextlib.suppress(FileNotFoundError):  # it was removed meanwhile
                if entry.is_dir(follow_symlinks=False):
                    found += self._walk(folder / entry.name, f"{prefix}{entry.name}/")
                    continue
                status = entry.stat(follow_symlinks=False)
                key = f"{prefix}{entry.name}"
                found.append(StoredObject(key, status.st_size, status.st_mtime))
        return found

    def delete(self, key: str) -> None:
        path = self.path(key)
        try:
            path.unlink()
            sync_folder(path.parent)
        except FileNotFoundError:
            return
        except OSError as error:
            raise sink_error("remove", str(path), error) from error
        if key.count("/") > 1:  # a snapshot's own folder goes with its last file
            with contextlib.suppress(OSError):
                path.parent.rmdir()

    def sink(self, key: str) -> Sink:
        path = self.path(key)
        try:
            self._make_folders(path.parent)
        except OSError as error:
            raise sink_error("make", str(path.parent), error) from error
        return LocalSink(path)

    def _make_folders(self, folder: Path) -> None:
        """Create folders durably, with mode 0711: other users can pass through but not list them.
        The VM of another user needs this to open its disk copies."""
        if folder.is_dir():
            return
        if folder.parent != folder:
            self._make_folders(folder.parent)
        with contextlib.suppress(FileExistsError):
            folder.mkdir(mode=0o711)
        sync_folder(folder.parent)

    def path(self, key: str) -> Path:
        if not key or any(not part or part.startswith(".") for part in key.split("/")):
            raise UsageError(f"{key!r} is no object's key")
        return self._folder / key


def sync_folder(folder: Path) -> None:
    """Make the names in a folder durable. Raises OSError if that fails."""
    fd = os.open(folder, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        os.fsync(fd)
    finally:
        os.close(fd)
