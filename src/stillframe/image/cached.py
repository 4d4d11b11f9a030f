"""Complete images on disk, by the ids of their snapshots: VMs map them, and nothing is filled.

An image is a directory with a sparse file per RAM block and ``image.json``. It gets its name once
all of it is on disk, and never changes after that. Each process that uses it, and each VM on it,
holds a shared lock on ``image.json`` (flock(2)); removal needs an exclusive one.
"""

from __future__ import annotations

import contextlib
import datetime
import errno
import fcntl
import os
import re
import secrets
import shutil
import stat
from collections.abc import Iterator, Sequence
from pathlib import Path

import msgspec

from stillframe.errors import BusyError, HostError, NotFoundError, RefusedError, UsageError
from stillframe.image.stored import (
    ENVIRONMENT,
    RECORD,
    ImageRecord,
    OpenImage,
    StoredImage,
    images_directory,
    read_record,
)
from stillframe.store.backends.folder import sync_folder
from stillframe.store.backends.oserrors import sink_error

DEFAULT_LIMIT_BYTES = 16 << 30
_LIMIT = "limit.json"
_NEW, _GONE = ".new-", ".gone-"
_SHORTEST_ID = 6
_ID = re.compile("[0-9a-f]{64}")
_OTHERS = 0o022


class ImageCache:
    """The images of one user, in one directory. Any number of processes may use it at once.

    Raises:
        HostError: other users may write to the directory, so its images cannot be trusted; or its
            permissions cannot be read.
    """

    def __init__(self, directory: Path | None = None) -> None:
        self.directory = images_directory() if directory is None else directory
        self._check_trust()

    def _check_trust(self) -> None:
        """Raise HostError as the class does."""
        try:
            status = self.directory.stat()
        except (FileNotFoundError, NotADirectoryError):
            return
        except OSError as error:  # another user's home, or a server that does not answer
            raise HostError(
                f"cannot look at {self.directory}",
                why=error.strerror,
                remedy=f"set {ENVIRONMENT} to a directory of your own",
            ) from error
        else:
            if not stat.S_ISDIR(status.st_mode):
                raise HostError(
                    f"{self.directory} is no directory",
                    remedy=f"set {ENVIRONMENT} to a directory of your own",
                )
            if status.st_uid != os.geteuid() or status.st_mode & _OTHERS:
                raise HostError(
                    f"images in {self.directory} cannot be trusted",
                    why="others may write there",
                    remedy=f"set {ENVIRONMENT} to a directory that only you may write to",
                )

    # Existing images

    def images(self) -> list[StoredImage]:
        """Return all images, the most recently used one first.

        Raises:
            HostError: not permitted.
        """
        found = []
        with self._turn():  # a concurrent listing holds locks, and would look like a user
            for name in self._names():
                with contextlib.suppress(NotFoundError, OSError), self._open(name) as image:
                    found.append(self._describe(image))
        return sorted(found, key=lambda image: image.used, reverse=True)

    def find(self, name: str) -> StoredImage:
        """Return the image of that snapshot id, or of the id that starts so.

        Raises:
            NotFoundError: there is none. UsageError: ambiguous, or too short.
        """
        found = [one for one in self.images() if one.id.startswith(name)]
        if len(found) > 1 or len(name) < _SHORTEST_ID:
            why = "several images are called so" if len(found) > 1 else "it is too short"
            raise UsageError(f"{name!r} is no image's id", why=why, remedy="write more of the id")
        if not found:
            raise NotFoundError(
                f"there is no image {name!r}", remedy="'stillframe image ls' lists them"
            )
        return found[0]

    def open(self, snapshot_id: str, content_id: str = "") -> OpenImage | None:
        """Open the image of a snapshot for VMs to run on; None if there is no sound one.

        Args:
            content_id: id of the frames that are read, if they are a whole form's. A whole form's
                relation to its snapshot is only its writer's word, so an image made of one does not
                count for the id alone.
        """
        try:
            image = self._open(snapshot_id)
        except (NotFoundError, HostError, OSError):
            return None
        is_of_it = image.record.content_id in (snapshot_id, content_id)
        if not is_of_it or not image.is_sound:
            image.close()
            return None
        with contextlib.suppress(OSError):
            os.utime(image.lock)
        return image

    def has(self, snapshot_id: str, content_id: str = "") -> bool:
        """Return whether :meth:`open` finds an image."""
        image = self.open(snapshot_id, content_id)
        if image is not None:
            image.close()
        return image is not None

    @property
    def limit_bytes(self) -> int:
        """Limit on the disk space of all images together."""
        try:
            content = (self.directory / _LIMIT).read_bytes()
            return max(0, msgspec.json.decode(content, type=int))
        except (OSError, msgspec.MsgspecError):
            return DEFAULT_LIMIT_BYTES

    def set_limit(self, limit_bytes: int) -> None:
        """Set the limit for all users of the cache, and enforce it.

        Raises:
            UsageError: it is negative. SinkError: not permitted, or the disk is full.
        """
        if limit_bytes < 0:
            raise UsageError(f"a limit of {limit_bytes} bytes makes no sense")
        self._make()
        new = self.directory / f"{_NEW}limit-{secrets.token_hex(4)}"
        try:
            with self._turn():  # else it could be swept
                new.write_bytes(msgspec.json.encode(limit_bytes))
                new.replace(self.directory / _LIMIT)
        except OSError as error:
            raise sink_error("write to", str(self.directory), error) from error
        self.make_room(0)

    def _names(self) -> list[str]:
        try:
            return [p.name for p in self.directory.iterdir() if _ID.fullmatch(p.name)]
        except FileNotFoundError:
            return []
        except OSError as error:
            raise HostError(f"cannot list {self.directory}", why=error.strerror) from error

    def _open(self, name: str) -> OpenImage:
        """Open and lock an image. Raises NotFoundError: not an image. OSError: gone, or not
        permitted."""
        directory = self.directory / name
        while True:
            lock = os.open(directory / RECORD, os.O_RDONLY | os.O_NOFOLLOW | os.O_CLOEXEC)
            try:
                fcntl.flock(lock, fcntl.LOCK_SH)
                if _is_still_there(lock, directory):
                    return OpenImage(read_record(lock, name), lock, directory)
            except BaseException:
                os.close(lock)
                raise
            os.close(lock)  # removed meanwhile; there may be a new one now

    def _describe(self, image: OpenImage) -> StoredImage:
        record, used_s = image.record, os.fstat(image.lock).st_mtime
        return StoredImage(
            id=record.snapshot_id,
            vm=record.vm,
            snapshot=record.snapshot,
            created=record.created,
            used=datetime.datetime.fromtimestamp(used_s, datetime.UTC).isoformat(
                timespec="milliseconds"
            ),
            size_bytes=record.size_bytes,
            in_use=not _alone(image.lock),
            is_sound=image.is_sound,
        )

    # Making and removing

    def remove(self, snapshot_id: str) -> None:
        """Remove an image.

        Raises:
            NotFoundError: there is none. BusyError: VMs run on it. HostError: not permitted.
        """
        if not self._remove(snapshot_id):
            raise BusyError(
                f"image {snapshot_id[:12]} is in use",
                why="VMs run on it",
                remedy="end them first; 'stillframe ps' lists them",
                guest_state="running",
            )

    def forget(self, snapshot_ids: Sequence[str]) -> None:
        """Remove the images of removed snapshots, except those in use. Never raises."""
        for snapshot_id in snapshot_ids:
            with contextlib.suppress(NotFoundError, HostError):
                self._remove(snapshot_id)

    def _remove(self, name: str) -> bool:
        """Remove an image; return whether it is gone. It is not if it is in use."""
        directory = self.directory / name
        try:
            lock = os.open(directory / RECORD, os.O_RDONLY | os.O_NOFOLLOW | os.O_CLOEXEC)
        except (FileNotFoundError, NotADirectoryError) as error:
            raise NotFoundError(f"there is no image {name!r}") from error
        except OSError as error:
            raise HostError(f"cannot open {directory}", why=error.strerror) from error
        try:
            with self._turn():
                fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
                if not _is_still_there(lock, directory):
                    return True  # another process was faster; the name now belongs to a new image
                gone = self.directory / f"{_GONE}{secrets.token_hex(4)}"
                directory.rename(gone)
            shutil.rmtree(gone)
        except BlockingIOError:
            return not _is_still_there(lock, directory)  # the holder may be removing it
        except FileNotFoundError:
            pass  # a sweeper was faster
        except OSError as error:
            raise HostError(f"cannot remove {directory}", why=error.strerror) from error
        finally:
            os.close(lock)
        return True

    def _is_rid_of(self, name: str) -> bool:
        """Remove an image as :meth:`_remove`; return True also if another process removed it
        meanwhile."""
        try:
            return self._remove(name)
        except NotFoundError:
            return True

    def make_room(self, needed_bytes: int, *, keep: str = "") -> None:
        """Evict the least recently used images until ``needed_bytes`` more fit in the limit; never
        those in use.

        Args:
            keep: id of an image that stays.

        Raises:
            RefusedError: it does not fit. HostError: not permitted.
        """
        self.sweep()
        limit_bytes, images = self.limit_bytes, self.images()
        taken_bytes = sum(image.size_bytes for image in images)
        for image in reversed(images):  # damaged images go first
            if not image.is_sound and image.id != keep and self._is_rid_of(image.id):
                taken_bytes -= image.size_bytes
        if needed_bytes:
            stay_bytes = sum(i.size_bytes for i in images if i.is_sound and i.in_use)
            if stay_bytes + needed_bytes > limit_bytes:  # evict nothing in vain
                raise does_not_fit(needed_bytes, limit_bytes, stay_bytes)
        for image in reversed(images):
            if taken_bytes + needed_bytes <= limit_bytes:
                return
            if (
                image.is_sound
                and not image.in_use
                and image.id != keep
                and self._is_rid_of(image.id)
            ):
                taken_bytes -= image.size_bytes
        if needed_bytes and taken_bytes + needed_bytes > limit_bytes:
            raise does_not_fit(needed_bytes, limit_bytes, taken_bytes)

    def sweep(self) -> None:
        """Remove what dead processes left while making or removing images, and what can no longer
        be an image."""
        for name in self._no_images():
            with contextlib.suppress(HostError):
                self._is_rid_of(name)
        with self._turn():
            for path in self._hidden():
                with contextlib.suppress(OSError):
                    if path.is_dir():
                        self._sweep_directory(path)
                    else:
                        path.unlink()

    def _no_images(self) -> list[str]:
        """Return the names that look like an image's but are not one."""
        found = []
        with self._turn():
            for name in self._names():
                try:
                    self._open(name).close()
                except NotFoundError:
                    found.append(name)
                except OSError:
                    continue
        return found

    @staticmethod
    def _sweep_directory(path: Path) -> None:
        """Remove a hidden directory. Raises OSError: in use, or it cannot be removed."""
        with contextlib.suppress(FileNotFoundError):
            lock = os.open(path / RECORD, os.O_RDONLY | os.O_NOFOLLOW | os.O_CLOEXEC)
            try:
                fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            finally:
                os.close(lock)
        shutil.rmtree(path)

    @contextlib.contextmanager
    def _turn(self) -> Iterator[None]:
        """Hold the cache's lock, briefly: so no sweep comes between making a directory and locking
        it, and no listing during a removal.

        Raises:
            HostError: the file system has no locks.
        """
        try:
            fd = os.open(self.directory, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
        except OSError:
            yield  # nothing is there to be swept
            return
        try:
            try:
                fcntl.flock(fd, fcntl.LOCK_EX)
            except OSError as error:
                raise HostError(f"cannot lock {self.directory}", why=error.strerror) from error
            yield
        finally:
            os.close(fd)

    def _hidden(self) -> list[Path]:
        try:
            return [p for p in self.directory.iterdir() if p.name.startswith((_NEW, _GONE))]
        except OSError:
            return []

    def _make(self) -> None:
        try:
            self.directory.mkdir(mode=0o700, parents=True, exist_ok=True)
        except OSError as error:
            raise sink_error("make", str(self.directory), error) from error
        self._check_trust()  # another user may have made it since the last check

    def new_directory(self) -> tuple[Path, int]:
        """Make a directory for a new image, with an empty ``image.json``; return it and the lock on
        that. ``publish`` names it.

        Raises:
            SinkError: not permitted, or the disk is full. HostError: as for the class.
        """
        self._make()
        path = self.directory / f"{_NEW}{secrets.token_hex(8)}"
        flags = os.O_RDWR | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC
        lock = -1
        try:
            with self._turn():
                path.mkdir(mode=0o700)
                lock = os.open(path / RECORD, flags, 0o600)
                fcntl.flock(lock, fcntl.LOCK_EX)
        except OSError as error:
            if lock >= 0:
                os.close(lock)
            shutil.rmtree(path, ignore_errors=True)
            raise sink_error("make an image in", str(self.directory), error) from error
        return path, lock

    def _is_named(self, path: Path, name: Path, lock: int) -> bool:
        """Rename as :func:`_renamed`; release the lock on success."""
        with self._turn():
            done = _renamed(path, name)
            if done:
                fcntl.flock(lock, fcntl.LOCK_UN)
        return done

    def publish(self, path: Path, lock: int, record: ImageRecord) -> bool:
        """Name an image and release its lock. Its files are on disk already.

        Returns:
            False if another process has made the same image meanwhile: that one stays.

        Raises:
            SinkError: the disk fails or is full. HostError: something else has that name.
                BusyError: a damaged image has it, and VMs run on that.
        """
        name = self.directory / record.snapshot_id
        try:
            content = msgspec.json.encode(record)
            os.pwrite(lock, content, 0)
            os.fsync(lock)
            sync_folder(path)
            while not self._is_named(path, name, lock):
                if self.has(record.snapshot_id, record.content_id):
                    return False
                if not (name / RECORD).exists() and name.exists():
                    raise HostError(f"{name} is in the way", why="it is no image")
                if not self._is_rid_of(record.snapshot_id):
                    if self.has(record.snapshot_id, record.content_id):
                        return False
                    raise BusyError(
                        f"image {record.snapshot_id[:12]} is damaged, and in use",
                        why="VMs run on it",
                        remedy="end them first; 'stillframe ps' lists them",
                        guest_state="running",
                    )
            sync_folder(self.directory)
        except OSError as error:
            raise sink_error("write an image to", str(self.directory), error) from error
        return True


def does_not_fit(needed_bytes: int, limit_bytes: int, taken_bytes: int = 0) -> RefusedError:
    """Return the error for an image that is too large. ``taken_bytes``: size of the images in
    use."""
    used = f"; {taken_bytes >> 20} MiB are in use" if taken_bytes else ""
    return RefusedError(
        "the image does not fit into the cache",
        why=f"it takes {needed_bytes >> 20} MiB, the limit is {limit_bytes >> 20} MiB{used}",
        remedy="raise the limit: 'stillframe image limit SIZE'",
        guest_state="none",
    )


def _renamed(path: Path, name: Path) -> bool:
    """Rename a directory; return False if the name is taken."""
    try:
        path.rename(name)
    except OSError as error:
        if error.errno not in (errno.ENOTEMPTY, errno.EEXIST):
            raise
        return False
    return True


def _is_still_there(lock: int, directory: Path) -> bool:
    """Return whether the locked record belongs to the image that has the name now."""
    try:
        return os.path.samestat(os.fstat(lock), (directory / RECORD).stat())
    except FileNotFoundError:
        return False


def _alone(lock: int) -> bool:
    """Return whether no other process holds the lock; it is shared again afterwards."""
    try:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        # The kernel drops the shared lock before it tries (flock(2)).
        fcntl.flock(lock, fcntl.LOCK_SH)
        return False
    fcntl.flock(lock, fcntl.LOCK_SH)
    return True
