"""The hand-over of a filling to another process: what that process inherits, and its start."""

from __future__ import annotations

import os
import select
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path

import msgspec

from stillframe.errors import HostError

READY_TIMEOUT_S = 30.0


class Handles(msgspec.Struct, frozen=True, kw_only=True):
    """Descriptors that a filler process inherits. ``uffds``: by the clones' process ids. ``keys``:
    the data keys of encrypted snapshots, as a command line is public. ``heir``: whether it gets an
    heir, which goes on if it dies."""

    lock: int
    files: tuple[int, ...]
    uffds: dict[int, int]
    ready: int
    go: int
    keys: int
    heir: bool = False


def write_keys(secrets: Mapping[bytes, bytes]) -> int:
    """Write the keys to a nameless file in memory; return its descriptor."""
    fd = os.memfd_create("keys", os.MFD_CLOEXEC)
    text = {key_id.hex(): secret.hex() for key_id, secret in secrets.items()}
    with open(fd, "wb", closefd=False) as file:
        file.write(msgspec.json.encode(text))
    os.lseek(fd, 0, os.SEEK_SET)
    return fd


def read_keys(fd: int) -> dict[bytes, bytes]:
    """Return what :func:`write_keys` was given; close the descriptor."""
    with os.fdopen(fd, "rb") as file:
        text = msgspec.json.decode(file.read(), type=dict[str, str])
    return {bytes.fromhex(key_id): bytes.fromhex(secret) for key_id, secret in text.items()}


def says_ready(fd: int) -> bool:
    """Return whether the process at the other end gets ready in time."""
    poll = select.poll()
    poll.register(fd, select.POLLIN)
    return bool(poll.poll(READY_TIMEOUT_S * 1000)) and os.read(fd, 1) == b"1"  # b"": it died


def start_process(
    record_path: Path, handles: Handles, log_path: Path | None
) -> subprocess.Popen[bytes]:
    """Start the process, with the handles' descriptors.

    Raises:
        HostError: it does not start.
    """
    own = str(Path(__file__).parents[2])
    paths = [own, *filter(None, os.environ.get("PYTHONPATH", "").split(os.pathsep))]
    arguments = [str(record_path.absolute()), msgspec.json.encode(handles).decode()]
    pipes = (handles.ready, handles.go, handles.keys)
    fds = (handles.lock, *handles.files, *handles.uffds.values(), *pipes)
    try:
        with (log_path or Path(os.devnull)).open("ab") as log:
            return subprocess.Popen(
                [sys.executable, "-m", "stillframe.image.filler_process", *arguments],
                stdin=subprocess.DEVNULL,
                stdout=subprocess.DEVNULL,
                stderr=log,
                pass_fds=fds,
                start_new_session=True,
                env=os.environ | {"PYTHONPATH": os.pathsep.join(paths)},
            )
    except OSError as error:
        raise HostError("the image's filler does not start", why=str(error)) from error
