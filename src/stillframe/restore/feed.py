"""The writer of the stream, into the pipe that the new VM reads."""

from __future__ import annotations

import contextlib
import fcntl
import os
import select
import time
from collections.abc import Callable

from stillframe.errors import DataError, MachineError
from stillframe.restore.clock import set_back
from stillframe.restore.emulator import Emulator
from stillframe.restore.untouched import Touched, stream_to
from stillframe.still.snapshot import Snapshot

_PIPE_BYTES = 1 << 20
_STALL_TIMEOUT_S = 60.0
_POLL_MS = 200
_END_TIMEOUT_S = 5.0

Progress = Callable[[int, int], None]
"""Called with the stream bytes sent and the stream bytes in all."""


def feed(
    snapshot: Snapshot,
    emulator: Emulator,
    on_progress: Progress | None,
    touched: Touched,
    *,
    shift_ns: int = 0,
) -> None:
    """Send the stream; check each frame's digest before any byte of it is sent.

    Args:
        touched: the populated parts of the new VM's RAM; elsewhere zero pages are left out.
        shift_ns: how far the guest's RTC is set back.

    Raises:
        DataError: the snapshot is damaged; the VM got none of the damaged frame.
        MachineError: the VM ended, or took no data for a minute.
    """
    fd = emulator.stream_fd
    os.set_blocking(fd, False)
    with contextlib.suppress(OSError):  # beyond the user's limit: the default size will do
        fcntl.fcntl(fd, fcntl.F_SETPIPE_SZ, _PIPE_BYTES)
    total = snapshot.manifest.stream_bytes
    sent = 0
    clock_is_set = not shift_ns
    for number, (piece, stands_for_bytes) in enumerate(stream_to(snapshot, touched)):
        # Only outside of RAM: a guest's memory may hold what looks like a clock's state.
        if not clock_is_set and not snapshot.index.runs_of_frame(number):
            piece, clock_is_set = set_back(piece, shift_ns)
        _send(emulator, fd, memoryview(piece)[emulator.sent_bytes if number == 0 else 0 :])
        sent += stands_for_bytes
        if on_progress is not None:
            on_progress(sent, total)
    if not clock_is_set:
        raise DataError("the RTC's state is not in one piece of the stream")
    emulator.close_stream()


def _send(emulator: Emulator, fd: int, rest: memoryview) -> None:
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
