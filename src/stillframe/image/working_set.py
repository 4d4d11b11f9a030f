"""The working set of a snapshot: the frames that the guest requested after a restore.

Kept beside the snapshot as ``FILE.still.working-set``, so that the next restore loads them first.
It only saves time: a damaged one, or another snapshot's, is ignored.
"""

from __future__ import annotations

import contextlib
import os
import secrets
from collections.abc import Iterable
from pathlib import Path

import msgspec

from stillframe.errors import HostError
from stillframe.still.frames import digest_of
from stillframe.still.host_mark import state_directory
from stillframe.store.backends.bucket import is_bucket_url

MOST_FRAMES = 4096
_MOST_BYTES = 1 << 20


class _WorkingSet(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    format: int = 1
    snapshot: str
    frames: list[int]


def working_set_path(snapshot_path: str | os.PathLike[str]) -> Path:
    """Return the file of the working set; for a snapshot in a bucket, it is in the user's state
    directory."""
    if is_bucket_url(os.fspath(snapshot_path)):
        name = digest_of(os.fsencode(snapshot_path)).hex()[:32]
        return state_directory() / "working-sets" / name
    path = Path(snapshot_path)
    return path.with_name(path.name + ".working-set")


def load_working_set(
    snapshot_path: str | os.PathLike[str], content_id: str, frame_count: int
) -> list[int]:
    """Return the frames in the order of their first request; empty if there is no working set for
    the content that is read: a whole form has frames of its own."""
    try:
        with working_set_path(snapshot_path).open("rb") as file:
            content = file.read(_MOST_BYTES + 1)
        found = msgspec.json.decode(content, type=_WorkingSet)
    except (HostError, OSError, msgspec.MsgspecError, UnicodeDecodeError):
        return []
    if found.format != 1 or found.snapshot != content_id:
        return []
    frames = dict.fromkeys(frame for frame in found.frames if 0 <= frame < frame_count)
    return list(frames)[:MOST_FRAMES]


def save_working_set(
    snapshot_path: str | os.PathLike[str], content_id: str, frames: Iterable[int]
) -> bool:
    """Write the working set, whole or not at all; return whether that worked. Never raises."""
    kept = list(dict.fromkeys(frames))[:MOST_FRAMES]
    try:
        path = working_set_path(snapshot_path)
        if is_bucket_url(os.fspath(snapshot_path)):
            path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
    except (HostError, OSError):
        return False
    new = path.with_name(f".{path.name}.{secrets.token_hex(4)}")
    try:
        flags = os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC
        with open(new, "wb", opener=lambda name, _: os.open(name, flags, 0o600)) as file:
            file.write(msgspec.json.encode(_WorkingSet(snapshot=content_id, frames=kept)))
        new.replace(path)
    except OSError:
        with contextlib.suppress(OSError):
            new.unlink()
        return False
    return True
