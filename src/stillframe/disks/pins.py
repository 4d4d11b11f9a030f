"""Pins: small files beside overlays that say which snapshot needs the images below.

Folding an overlay back writes to the image below it, and destroys a snapshot that refers to that
image. So a take pins its overlay before its snapshot has a name, and every fold checks the pin.
"""

from __future__ import annotations

import os
from pathlib import Path

import msgspec

from stillframe.errors import SinkError, StillframeError
from stillframe.store import open_file

PIN = ".pin"


class _Pin(msgspec.Struct, frozen=True):
    snapshot: str
    pending: bool


def pin(overlay: str, snapshot: str, *, pending: bool) -> None:
    """Record durably that ``snapshot`` needs the images below ``overlay``.

    Args:
        pending: the snapshot has no name yet. If it never gets one, the overlay is nobody's.

    Raises:
        SinkError: the pin cannot be written.
    """
    path = Path(overlay + PIN)
    try:
        fd = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_CLOEXEC, 0o600)
        try:
            os.write(fd, msgspec.json.encode(_Pin(os.path.abspath(snapshot), pending)))  # noqa: PTH100
            os.fsync(fd)
        finally:
            os.close(fd)
    except OSError as error:
        raise SinkError(f"cannot write {path}", why=error.strerror) from error


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
    if not Path(snapshot).exists():
        return None if Path(snapshot).parent.is_dir() else snapshot
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
    except (OSError, msgspec.MsgspecError):
        return None
