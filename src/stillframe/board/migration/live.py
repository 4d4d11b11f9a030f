"""What precopy and postcopy share: the way out, what is dirty, and the destination's word."""

from __future__ import annotations

import io
import os
import threading
import time
from contextlib import ExitStack
from typing import TYPE_CHECKING

from stillframe.board.memory.own_protection import open_own_protection
from stillframe.board.migration.capabilities import POSTCOPY_RAM, RETURN_PATH
from stillframe.board.migration.counters import Counters
from stillframe.board.migration.outgoing import Outgoing
from stillframe.board.migration.outgoing_channel import OutgoingChannel
from stillframe.board.migration.source_link import SourceLink
from stillframe.board.migration.stream_commands import ping
from stillframe.board.migration.tracked_ram import TrackedRam
from stillframe.board.migration.unconfirmed import wait_stored, wait_taken
from stillframe.capture.ram_capture import RamCapture
from stillframe.errors import HostError, SinkError, SnapshotFailed
from stillframe.model import TARGET_PAGE_BYTES, Downtime, StoppedWrite
from stillframe.snapshot import faultpoints
from stillframe.snapshot.arming import open_capture
from stillframe.snapshot.rate import RateMeter
from stillframe.still.frames import BytesLike

if TYPE_CHECKING:
    from stillframe.board.hardware.board import Board

_ANSWER_S = 2.0
"""How long a destination may take for its first answer; the guest runs meanwhile."""
_ANSWER_STEP_S = 0.02
SPAN_S = 0.3
"""More than one window: the first may only have filled buffers on the way."""
_SHARE = 0.5
"""Of what a channel without a limit takes: while the guest is stopped there are also the devices,
and the destination's answer."""
_GATHER_BYTES = 64 << 10
_PING_DRAIN = 0x100
"""Numbers from here on are of ``drain``."""


def dependable_bytes_per_s(meter: RateMeter) -> float:
    """What the destination will surely take while the guest is stopped; 0.0 before it is known.

    The least of the last windows. Only the time counts in which there was something to send, else a
    guest that writes little would have a slow channel.

    Args:
        meter: of the bytes sent, and the seconds that this took without what was waited to keep
            within the bandwidth limit.
    """
    return min(
        # Who had to wait has shown that the channel takes at least as much.
        (
            min(sent / passed_s, _SHARE * sent / max(1e-9, busy_s))
            for passed_s, (sent, busy_s) in meter.windows
        ),
        default=0.0,
    )


class GatheredOutput:
    """Gathers small writes, and counts all."""

    def __init__(self, channel: OutgoingChannel, counters: Counters) -> None:
        self._channel = channel
        self._counters = counters
        self._small: list[bytes] = []
        self._small_bytes = 0

    def write(self, data: BytesLike, /) -> None:
        """Take ``data``; it may go out only at ``flush``.

        Raises:
            SinkError: the destination failed.
        """
        length_bytes = memoryview(data).nbytes
        if length_bytes >= _GATHER_BYTES:
            self.flush()
            self._send(data)
            return
        self._small.append(bytes(data))
        self._small_bytes += length_bytes
        if self._small_bytes >= _GATHER_BYTES:
            self.flush()

    def flush(self) -> None:
        """Let everything go out that was written so far.

        Raises:
            SinkError: the destination failed.
        """
        if self._small:
            gathered = b"".join(self._small)
            self._small, self._small_bytes = [], 0
            self._send(gathered)

    def _send(self, data: BytesLike) -> None:
        self._channel.write(data)
        self._counters.took(memoryview(data).nbytes)


class StoppedGuest:
    """A context: the guest is stopped in run state ``finish-migrate``. Source: QEMU
    ``migration/migration.c``: migration_stop_vm, migration_iteration_finish.

    Left by an exception, its disks are active again and it is in the state that it had, or
    ``paused`` if somebody stopped it meanwhile; unless
    ``handed_over`` was called: then it stays stopped, in ``postmigrate``, in any case.
    """

    def __init__(self, board: Board) -> None:
        self._board = board
        self._handed_over = False
        self._began_s = self._stopped_s = self._saved_s = 0.0

    def __enter__(self) -> StoppedGuest:
        self._began_s = time.monotonic()
        self._board.stop("finish-migrate")
        self._stopped_s = self._saved_s = time.monotonic()
        return self

    def devices_saved(self) -> None:
        """From here on it is what the destination does that takes time."""
        self._saved_s = time.monotonic()

    def handed_over(self) -> None:
        """The guest may run elsewhere from now on, and must not go on here by itself."""
        self._handed_over = True

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        with self._board.lock:
            if kind is None or self._handed_over:
                self._board.stop("postmigrate")
            else:
                self._board.return_from_sending()

    @property
    def downtime(self) -> Downtime:
        """How long it has been stopped."""
        return Downtime(
            stop_ms=(self._stopped_s - self._began_s) * 1e3,
            devices_ms=(self._saved_s - self._stopped_s) * 1e3,
            cont_ms=(time.monotonic() - self._saved_s) * 1e3,
        )


class LiveTransfer:
    """A live migration under way. For its own thread."""

    def __init__(self, task: Outgoing, channel: OutgoingChannel, cleanup: ExitStack) -> None:
        """Prepare; the guest is not touched.

        Raises:
            HostError: writes cannot be tracked here, or the channel has no way back.
        """
        self.task = task
        self.channel = channel
        self.board = task.board
        self.saver = task.board.saver
        self.counters = task.counters
        self.out = GatheredOutput(channel, task.counters)
        rams = tuple(task.board.rams)
        blocks = tuple(ram.block() for ram in rams)
        task.control.enter("setup", "attaching")
        self.capture: RamCapture = open_capture(
            task.control,
            cleanup,
            open_own_protection(task.protection),
            os.getpid(),
            blocks,
            spill_bytes=0,  # nothing is copied before a write passes
        )
        cleanup.callback(task.control.progress.keep)
        self.capture.track_finely()
        self.meter = RateMeter(SPAN_S)
        self.ram = TrackedRam(rams, self.capture, task.counters, self._told_sync)
        cleanup.callback(self.ram.close)
        self.link: SourceLink | None = None
        if channel.return_path is not None:
            self.link = SourceLink(channel.return_path, self.ram.request)
            cleanup.callback(self.link.end)
            cleanup.callback(task.interrupt.set)  # before that, so that it ends
        elif task.capabilities[POSTCOPY_RAM] or task.capabilities[RETURN_PATH]:
            raise HostError("Unable to open return-path for postcopy", guest_state="running")
        self._answer_by_s = 0.0
        self._drains = 0
        self._limit = task.control.limit
        task.handler.blocks = [(ram.idstr, ram.length_bytes) for ram in rams]
        task.handler.sender = self.ram

    def _told_sync(self, count: int) -> None:
        self.task.tell("MIGRATION_PASS", {"pass": count})

    def check(self) -> None:
        """Raise what stands in the way of going on.

        Raises:
            SnapshotCancelled: it was cancelled. SinkError, DataError: the destination failed.
            SnapshotFailed: RAM was dropped. MachineError: RAM cannot be protected.
        """
        self.task.control.check_cancelled()
        self.capture.check()
        if self.link is not None:
            self.link.check()

    def iterate(self, bytes_per_s: int) -> None:
        """Send one batch, at most so fast; 0 is unlimited. A requested page need not wait."""
        began_s, before = time.monotonic(), self.counters.transferred_bytes
        self.ram.limit_batch(bytes_per_s)
        self.saver.iterate(self.out, in_postcopy=self.ram.in_postcopy)
        self.out.flush()
        self.counters.measure()
        self._limit.bytes_per_s = bytes_per_s or None
        sent_bytes = self.counters.transferred_bytes - before
        sent_s = time.monotonic()
        self._limit.wait(
            sent_bytes,
            self.link.requested if self.ram.in_postcopy and self.link else self._cancelled,
        )
        self.meter.add(time.monotonic() - began_s, sent_bytes, sent_s - began_s)
        self._expect_downtime()

    def _expect_downtime(self) -> None:
        bytes_per_s = dependable_bytes_per_s(self.meter)
        if bytes_per_s and self.counters.dirty_pages_per_s:
            self.counters.expected_downtime_ms = self.ram.synced_bytes / bytes_per_s * 1e3

    def drain(self) -> None:
        """Wait until the destination has loaded what was sent so far, if it answers; the guest runs
        meanwhile. The time counts for how fast the destination is.

        Raises:
            SinkError, DataError: it could not, or is gone. SnapshotCancelled: it was cancelled.
        """
        if self.link is None or not self.link.answered:
            return
        began_s = time.monotonic()
        self._drains += 1
        self.out.write(ping(_PING_DRAIN + self._drains))
        self.out.flush()
        self.link.wait_pong(_PING_DRAIN + self._drains)
        passed_s = time.monotonic() - began_s
        self.meter.add(passed_s, 0, passed_s)

    @property
    def _cancelled(self) -> threading.Event:
        return self.task.control.cancelled

    def expect_answer(self) -> None:
        """The destination was asked for its first answer."""
        self._answer_by_s = time.monotonic() + _ANSWER_S

    def heard(self) -> bool:
        """Whether the guest may be stopped: the destination has answered, or it never will and
        need not. A program that only stores what comes gets the stream as from QEMU, unconfirmed.

        Raises:
            SinkError: it does not answer, and a capability demands that it does; or it hung up, or
                does not read what is sent.
            SnapshotCancelled: it was cancelled.
        """
        if self.link is None or self.link.answered:
            return True
        if time.monotonic() < self._answer_by_s:
            return self.link.wait_answer(_ANSWER_STEP_S)
        if self.task.capabilities[POSTCOPY_RAM] or self.task.capabilities[RETURN_PATH]:
            raise SinkError(
                "the destination does not answer on the return path", guest_state="running"
            )
        self._wait_taken()
        return True

    def note_downtime(self, downtime: Downtime) -> None:
        """The guest was stopped for so long."""
        progress = self.task.control.progress
        progress.downtime = downtime
        progress.downtime_ms = self.counters.downtime_ms = downtime.total_ms

    def ask_how_far(self, number: int) -> None:
        """Wait until the destination has loaded all that was sent so far, if it says so; else
        until it was taken.

        Raises:
            SinkError, DataError: it could not, or is gone, or takes nothing.
            SnapshotCancelled: it was cancelled.
        """
        if self.link is not None:
            self.out.write(ping(number))
        self.out.flush()
        if self.link is None:
            return
        self._wait_taken()
        if self.link.answered:
            self.link.wait_pong(number)
        self.link.check()

    def _wait_taken(self) -> None:
        if self.link is not None and self.channel.peer is not None:
            wait_taken(self.channel.peer, self.link, self.task.control.check_cancelled)

    def wait_done(self) -> None:
        """After the stream's end: wait until the destination says that it has everything, or,
        if it never said anything, until it has read it.

        Raises:
            SinkError, DataError: it could not load, or is gone; or did not read.
        """
        if self.link is None:
            return
        if not self.link.answered and self.channel.peer is not None:
            wait_stored(self.channel.peer, self.link)
        if self.link.answered:
            self.link.wait_done()
            self.link.check()


def save_devices(live: LiveTransfer, out: io.BytesIO, *, end: io.BytesIO | None) -> None:
    """Save all device states of the guest, which is stopped; what they write to RAM is dirty,
    and reported.

    Args:
        end: takes the stream's end; None: the stream goes on.
    """
    live.ram.sync()
    with live.board.lock:
        live.saver.save_all_device_states(
            out, inactivate_disks=True, send_eof=end is not None, end=end
        )
    faultpoints.reach("devices")
    live.task.control.progress.writes_while_stopped = tuple(
        StoppedWrite(
            idstr=idstr,
            offset_bytes=first_page * TARGET_PAGE_BYTES,
            length_bytes=pages * TARGET_PAGE_BYTES,
        )
        for idstr, first_page, pages in live.ram.written_since()
    )


def check_still(live: LiveTransfer) -> None:
    """Refuse to hand over RAM that is not what it was when the devices were saved.

    Raises:
        SnapshotFailed: something wrote to it since.
    """
    written = live.ram.written_since()
    if written:
        idstr, first_page, _ = written[0]
        raise SnapshotFailed(
            "guest RAM was written while the guest was stopped",
            why=f"{idstr} at offset {first_page * TARGET_PAGE_BYTES:#x}",
            guest_state="running",
        )
    rams = [(ram.idstr, ram.length_bytes) for ram in live.board.rams]
    if rams != list(live.task.handler.blocks):
        raise SnapshotFailed("the RAM blocks changed while they were sent", guest_state="running")
