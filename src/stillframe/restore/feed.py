"""Writes the stream into the pipe that the new VM reads."""

from __future__ import annotations

import contextlib
import fcntl
import os
import select
import time
from collections.abc import Callable

from stillframe.errors import MachineError
from stillframe.restore.emulator import Emulator
from stillframe.store.snapshot import Snapshot

_PIPE_BYTES = 1 << 20
_STALL_TIMEOUT_S = 60.0
_POLL_MS = 200
_END_TIMEOUT_S = 5.0

Progress = Callable[[int, int], None]
"""Called with the bytes of the stream that were sent, and all of them."""


def feed(snapshot: Snapshot, emulator: Emulator, on_progress: Progress | None) -> None:
    """Send the whole stream; each frame's digest is checked before any byte of it is sent.

    Raises:
        DataError: the snapshot is damaged; the VM got none of the damaged frame.
        MachineError: it ended, or took nothing for a minute.
    """
    fd = emulator.stream_fd
    os.set_blocking(fd, False)
    with contextlib.suppress(OSError):  # beyond the user's limit: the usual size will do
        fcntl.fcntl(fd, fcntl.F_SETPIPE_SZ, _PIPE_BYTES)
    total = snapshot.manifest.stream_bytes
    sent = 0
    for piece in snapshot.iter_stream():
        _send(emulator, fd, piece)
        sent += len(piece)
        if on_progress is not None:
            on_progress(sent, total)
    emulator.close_stream()


def _send(emulator: Emulator, fd: int, piece: bytes) -> None:
    rest = memoryview(piece)
    poll = select.poll()
    poll.register(fd, select.POLLOUT)
    deadline_s = time.monotonic() + _STALL_TIMEOUT_S
    while rest:
        try:
            done = os.write(fd, rest)
        except BlockingIOError:
            if emulator.has_ended():
                raise emulator.failure("loading the snapshot") from None
            if time.monotonic() > deadline_s:
                raise MachineError(
                    f"{emulator.vmm_name} took no data for {_STALL_TIMEOUT_S:g} s",
                    why=emulator.last_words() or None,
                    guest_state="none",
                ) from None
            poll.poll(_POLL_MS)
            continue
        except OSError as error:
            emulator.wait_end(_END_TIMEOUT_S)
            raise emulator.failure("loading the snapshot") from error
        rest = rest[done:]
        deadline_s = time.monotonic() + _STALL_TIMEOUT_S
