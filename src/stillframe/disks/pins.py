"""Pins: small files beside overlays that say which snapshot needs the images below.

Folding an overlay back writes to the image below it, and destroys a snapshot that refers to that
image. So a take pins its overlay before its snapshot has a name, and every fold checks the pin.
"""

from __future__ import annotations

import os
import secrets
from pathlib import Path

import msgspec

from stillframe.errors import SinkError, StillframeError
from stillframe.store import open_file

PIN = ".pin"


class _Pin(msgspec.Struct, frozen=True):
    """``mount``: the mount point of the file system that the snapshot is on."""

    snapshot: str
    pending: bool
    mount: str = ""


_UNREADABLE = _Pin("a snapshot that its pin does not tell", False)


def pin(overlay: str, snapshot: str, *, pending: bool) -> None:
    """Record durably that ``snapshot`` needs the images below ``overlay``.

    Args:
        pending: the snapshot has no name yet. If it never gets one, the overlay is nobody's.

    Raises:
        SinkError: the pin cannot be written.
    """
    path = Path(overlay + PIN)
    new = path.with_name(f".{path.name}.{secrets.token_hex(4)}")
    place = os.path.abspath(snapshot)  # noqa: PTH100
    content = msgspec.json.encode(_Pin(place, pending, _mount_of(place)))
    try:
        try:
            _write(new, content)
            new.replace(path)
        finally:
            new.unlink(missing_ok=True)
        _sync(path.parent)
    except OSError as error:
        raise SinkError(f"cannot write {path}", why=error.strerror) from error


def _write(path: Path, content: bytes) -> None:
    with open(path, "xb", opener=lambda name, flags: os.open(name, flags, 0o600)) as file:
        file.write(content)
        file.flush()
        os.fsync(file.fileno())


def _sync(directory: Path) -> None:
    fd = os.open(directory, os.O_RDONLY | os.O_CLOEXEC | os.O_DIRECTORY)
    try:
        os.fsync(fd)
    finally:
        os.close(fd)


def unpin(overlay: str) -> None:
    """Remove the overlay's pin.

    Raises:
        OSError: the pin cannot be removed.
    """
    Path(overlay + PIN).unlink(missing_ok=True)


def pinned_by(overlay: str) -> str | None:
    """Return the snapshot that needs the images below; None if there is none (any more).

    A snapshot that cannot be read counts: it may be on a disk that is not mounted now.
    """
    found = _read(overlay)
    if found is None:
        return None
    snapshot = found.snapshot
    if found is _UNREADABLE:
        return snapshot
    if not Path(snapshot).exists():
        was_removed = Path(snapshot).parent.is_dir() and _mount_of(snapshot) == found.mount
        return None if was_removed else snapshot
    try:
        with open_file(snapshot) as opened:
            disks = opened.manifest.captured_disks
            return snapshot if any(disk.overlay == overlay for disk in disks) else None
    except StillframeError:
        return snapshot


def is_nobodys(overlay: str) -> bool:
    """Return whether the overlay has no pin, or its take died before the snapshot had a name."""
    found = _read(overlay)
    return found is None or (found.pending and pinned_by(overlay) is None)


def _read(overlay: str) -> _Pin | None:
    try:
        return msgspec.json.decode(Path(overlay + PIN).read_bytes(), type=_Pin)
    except FileNotFoundError:
        return None
    except (OSError, msgspec.MsgspecError):
        return _UNREADABLE  # a fold would destroy what some snapshot needs


def _mount_of(path: str) -> str:
    """Return the mount point of a path's file system, which may be absent now."""
    place = Path(os.path.realpath(path)).parent
    while not place.is_mount() and place != place.parent:
        place = place.parent
    return str(place)
