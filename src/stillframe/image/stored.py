"""A complete image's files on disk: ``image.json``, and a sparse file per RAM block."""

from __future__ import annotations

import contextlib
import os
import stat
from pathlib import Path
from typing import Self

import msgspec

from stillframe.errors import HostError, NotFoundError

ENVIRONMENT = "STILLFRAME_IMAGES"
RECORD = "image.json"
_MOST_BYTES = 1 << 20


class StoredBlock(msgspec.Struct, frozen=True, kw_only=True):
    """A RAM block's file. ``number``: number of the block in the snapshot. ``changed_ns``: the
    inode's change time; another one means that the file was written to since."""

    number: int
    idstr: str
    length_bytes: int
    changed_ns: int


class ImageRecord(msgspec.Struct, frozen=True, kw_only=True):
    """The content of ``image.json``. ``snapshot``: where the snapshot was; ``created``: when the
    image was made. ``size_bytes``: disk space of the files. ``content_id``: of the frames that it
    was made from (``Snapshot.content_id``)."""

    format: int = 1
    snapshot_id: str
    content_id: str = ""
    snapshot: str
    vm: str
    created: str
    size_bytes: int
    blocks: tuple[StoredBlock, ...]


class StoredImage(msgspec.Struct, frozen=True, kw_only=True):
    """An image of the cache. ``used``: when it was made or last started from. ``in_use``: VMs run
    on it or are being started. ``is_sound``: its files are unchanged."""

    id: str
    vm: str
    snapshot: str
    created: str
    used: str
    size_bytes: int
    in_use: bool
    is_sound: bool


class OpenImage:
    """An image of the cache that cannot be removed until :meth:`close`, nor while a VM runs that
    has inherited ``lock``."""

    def __init__(self, record: ImageRecord, lock: int, directory: Path) -> None:
        """Own ``lock`` from here on, unless this raises. Raises OSError: not permitted."""
        self.record = record
        self.lock = lock
        self.directory = directory
        self.fds: dict[int, int] = {}
        try:
            for block in record.blocks:
                with contextlib.suppress(FileNotFoundError):  # it is not sound then
                    self.fds[block.number] = os.open(
                        directory / block_name(block.number), os.O_RDONLY | os.O_CLOEXEC
                    )
        except BaseException:
            self._close_files()
            raise

    @property
    def is_sound(self) -> bool:
        """Whether the files are unchanged since the image was made."""
        for block in self.record.blocks:
            if block.number not in self.fds:
                return False
            status = os.fstat(self.fds[block.number])
            if (status.st_size, status.st_ctime_ns) != (block.length_bytes, block.changed_ns):
                return False
        return True

    def _close_files(self) -> None:
        for fd in self.fds.values():
            os.close(fd)
        self.fds = {}

    def close(self) -> None:
        """Close it; VMs that have inherited the lock still hold it."""
        self._close_files()
        if self.lock >= 0:
            os.close(self.lock)
            self.lock = -1

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_error: object) -> None:
        self.close()


def block_name(number: int) -> str:
    """Return the file name of a RAM block."""
    return f"{number}.ram"


def images_directory() -> Path:
    """Return the directory of the user's images; it may not exist yet.

    Raises:
        HostError: there is no home directory.
    """
    given = os.environ.get(ENVIRONMENT)
    if given:
        return Path(given).absolute()
    cache = os.environ.get("XDG_CACHE_HOME", "")
    if cache.startswith("/"):
        return Path(cache) / "stillframe" / "images"
    if os.geteuid() == 0:
        return Path("/var/cache/stillframe/images")
    home = Path(os.path.expanduser("~"))  # noqa: PTH111 - Path.home() raises without a home
    if not home.is_absolute():
        raise HostError("there is no home directory", remedy=f"set {ENVIRONMENT}")
    return home / ".cache" / "stillframe" / "images"


def read_record(fd: int, name: str) -> ImageRecord:
    """Read ``image.json`` of the image of that snapshot.

    Raises:
        NotFoundError: it is not such an image. OSError: it cannot be read.
    """
    try:
        status = os.fstat(fd)
        if not stat.S_ISREG(status.st_mode) or status.st_uid != os.geteuid():
            raise NotFoundError(f"{name} is no image of yours")
        record = msgspec.json.decode(os.pread(fd, _MOST_BYTES, 0), type=ImageRecord)
    except (msgspec.MsgspecError, UnicodeDecodeError) as error:
        raise NotFoundError(f"{name} is no image") from error
    if record.format != 1 or record.snapshot_id != name:
        raise NotFoundError(f"{name} is no image that we know")
    return record
