"""A separate process that fills an image, started by ``Filling.hand_over``."""

from __future__ import annotations

import contextlib
import fcntl
import os
import sys
from pathlib import Path

import msgspec

from stillframe.errors import BusyError, NotFoundError, StillframeError
from stillframe.image.filling import Filling
from stillframe.image.hand_over import Handles, read_keys
from stillframe.still.sealing import Unlock, unlock_with

_SWITCH_S = 0.0005
"""Short, so that the thread of a fault need not wait long for the decompressing threads."""


def main(record_path: str, handles_text: str) -> int:
    """Get ready, say so, wait for the go (or the other process's death), fill; return the exit
    code."""
    handles = msgspec.json.decode(handles_text, type=Handles)
    fds = (handles.lock, *handles.files, *handles.uffds.values(), handles.ready, handles.go)
    unlock = unlock_with(read_keys(handles.keys))
    sys.setswitchinterval(_SWITCH_S)
    try:
        if handles.heir and os.fork() == 0:  # no thread runs yet
            for fd in fds:
                os.close(fd)
            return inherit(Path(record_path), unlock)
        for fd in fds:
            os.set_inheritable(fd, False)
        filling = Filling.inherit(Path(record_path), handles.lock, handles, unlock)
        filling.prefetch()
        with contextlib.suppress(OSError):
            os.write(handles.ready, b"1")
        os.close(handles.ready)
        os.read(handles.go, 1)
        os.close(handles.go)
        filling.go_on()
        filling.wait()
    except StillframeError as error:
        print(f"stillframe: {error}", file=sys.stderr)  # noqa: T201 - its log
        return error.exit_code
    return 0


def inherit(record_path: Path, unlock: Unlock | None = None) -> int:
    """Wait until the filler is done or dead, then go on if anything is left to do; return the exit
    code."""
    while True:
        try:
            fd = os.open(record_path, os.O_RDWR | os.O_CLOEXEC | os.O_NOFOLLOW)
        except FileNotFoundError:
            return 0
        try:
            fcntl.flock(fd, fcntl.LOCK_EX)
        finally:
            os.close(fd)
        try:
            filling = Filling.adopt(record_path, unlock)
        except NotFoundError:
            return 0
        except BusyError:
            continue  # another heir
        filling.wait()
        return 0


if __name__ == "__main__":
    sys.exit(main(*sys.argv[1:]))
