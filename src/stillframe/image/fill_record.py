"""The record for another process to go on filling: which image, of which VMs. The file belongs to
the VMs' owner; the filler holds a lock on it."""

from __future__ import annotations

import contextlib
import fcntl
import math
import os
import time
from pathlib import Path

import msgspec

from stillframe.errors import BusyError, DataError, HostError, NotFoundError

_MOST_DIGITS = 64


class ClonePlace(msgspec.Struct, frozen=True, kw_only=True):
    """Where a clone is. ``started``: start in ticks since boot (``/proc/PID/stat``), since pids are
    reused. ``uffd``: its own descriptor. ``addresses``: of the image's blocks."""

    pid: int
    started: int
    uffd: int
    addresses: tuple[int, ...]


class FillRecord(msgspec.Struct, frozen=True, kw_only=True):
    """A filling. ``snapshot``: absolute path; empty while a running VM is forked, when no other
    process can go on. ``parents``: files of an increment's parents. ``blocks``: numbers of the
    image's blocks. ``files``: (device, inode) of their files. ``data_bytes``: size of a complete
    image's data pages."""

    format: int = 1
    snapshot: str
    snapshot_id: str
    parents: tuple[str, ...] = ()
    blocks: tuple[int, ...]
    files: tuple[tuple[int, int], ...]
    data_bytes: int
    clones: tuple[ClonePlace, ...]


def write_record(path: Path, record: FillRecord) -> int:
    """Write a record under its name, complete and locked; return the descriptor that holds the
    lock.

    Raises:
        HostError: it cannot be written.
    """
    new = path.with_name(f".{path.name}.new")
    flags = os.O_RDWR | os.O_CREAT | os.O_TRUNC | os.O_CLOEXEC | os.O_NOFOLLOW
    try:
        fd = os.open(new, flags, 0o600)
        try:
            fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
            os.write(fd, msgspec.json.encode(record))
            new.replace(path)
        except BaseException:
            os.close(fd)
            raise
    except OSError as error:
        raise HostError(f"cannot write {path}", why=error.strerror) from error
    return fd


def lock_record(path: Path) -> int:
    """Lock a record; return the descriptor that holds the lock.

    Raises:
        NotFoundError: nothing is being filled there. BusyError: another process is filling.
        HostError: not permitted.
    """
    try:
        fd = os.open(path, os.O_RDWR | os.O_CLOEXEC | os.O_NOFOLLOW)
    except FileNotFoundError as error:
        raise NotFoundError(f"no image is being filled at {path}") from error
    except OSError as error:
        raise HostError(f"cannot open {path}", why=error.strerror) from error
    if os.fstat(fd).st_uid != os.geteuid():
        os.close(fd)
        raise HostError(f"{path} belongs to somebody else", remedy="run as the VMs' user")
    try:
        fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError as error:
        os.close(fd)
        raise BusyError("somebody fills the image", remedy="wait for its end") from error
    return fd


def read_record(fd: int) -> FillRecord:
    """Read a locked record.

    Raises:
        DataError: malformed.
    """
    try:
        record = msgspec.json.decode(os.pread(fd, 1 << 24, 0), type=FillRecord)
    except (msgspec.MsgspecError, UnicodeDecodeError) as error:
        raise DataError("an image's record is malformed", why=str(error)) from error
    if record.format != 1:
        raise DataError(f"an image's record has format {record.format}, only 1 is known")
    return record


def note_complete(path: Path) -> None:
    """Note beside a record that its image is complete. Never raises: the note is optional."""
    place = _complete(path)
    flags = os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC
    with contextlib.suppress(OSError):
        place.unlink(missing_ok=True)
        with open(place, "wb", opener=lambda name, _: os.open(name, flags, 0o600)) as file:
            file.write(f"{time.monotonic():.6f}".encode())


def complete_s(path: Path) -> float | None:
    """Return when a record's image was complete (monotonic clock); None if it is not, or was not
    noted.

    Args:
        path: the record's path; the record itself is gone by then.
    """
    try:
        fd = os.open(_complete(path), os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC)
        try:
            moment_s = float(os.read(fd, _MOST_DIGITS))
        finally:
            os.close(fd)
    except (OSError, ValueError):
        return None
    return moment_s if math.isfinite(moment_s) else None


def _complete(path: Path) -> Path:
    return path.with_suffix(".complete")
