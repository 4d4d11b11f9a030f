"""The common part of precopy and postcopy: output, dirty RAM and the destination's answers."""

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
"""Time limit for the destination's first answer; the guest runs meanwhile."""
_ANSWER_STEP_S = 0.02
SPAN_S = 0.3
"""More than one window: the first may only have filled buffers along the path."""
_SHARE = 0.5
"""Usable share of an unlimited channel's rate: the device states and the destination's answer also
have to fit into the downtime."""
_GATHER_BYTES = 64 << 10
_PING_DRAIN = 0x100
"""``drain`` numbers its PINGs from here on."""


def dependable_bytes_per_s(meter: RateMeter) -> float:
    """Return the rate the destination can sustain while the guest is stopped; 0.0 if unknown.

    This is the slowest of the last windows. Idle time does not count, or a guest that writes little
    would make the channel look slow.

    Args:
        meter: counts the bytes sent and the seconds spent sending them, without the waits for the
            bandwidth limit.
    """
    return min(
        # If the limit made the sender wait, the channel takes at least sent / passed_s.
        (
            min(sent / passed_s, _SHARE * sent / max(1e-9, busy_s))
            for passed_s, (sent, busy_s) in meter.windows
        ),
        default=0.0,
    )


class GatheredOutput:
    """A buffer in front of the channel: gathers small writes and counts all bytes."""

    def __init__(self, channel: OutgoingChannel, counters: Counters) -> None:
        self._channel = channel
        self._counters = counters
        self._small: list[bytes] = []
        self._small_bytes = 0

    def write(self, data: BytesLike, /) -> None:
        """Write ``data``; small data may go out only at ``flush``.

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
        """Send everything written so far.

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
    """A context in which the guest is stopped, in run state ``finish-migrate``.

    On success, and after ``handed_over`` in any case, the guest stays stopped in ``postmigrate``.
    Otherwise an exception reactivates the disks and returns the guest to its former run state, or
    to ``paused`` if ``stop`` came meanwhile.
    Source: QEMU ``migration/migration.c``: migration_stop_vm, migration_iteration_finish.
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
        """Note that the devices are saved; sending and the destination take the remaining time."""
        self._saved_s = time.monotonic()

    def handed_over(self) -> None:
        """Note that the guest may now run at the destination, so it must not resume here."""
        self._handed_over = True

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        with self._board.lock:
            if kind is None or self._handed_over:
                self._board.stop("postmigrate")
            else:
                self._board.return_from_sending()

    @property
    def downtime(self) -> Downtime:
        """The guest's downtime so far."""
        return Downtime(
            stop_ms=(self._stopped_s - self._began_s) * 1e3,
            devices_ms=(self._saved_s - self._stopped_s) * 1e3,
            cont_ms=(time.monotonic() - self._saved_s) * 1e3,
        )


class LiveTransfer:
    """A live migration under way. For use by the migration's thread only."""

    def __init__(self, task: Outgoing, channel: OutgoingChannel, cleanup: ExitStack) -> None:
        """Prepare, without touching the guest.

        Raises:
            HostError: this host cannot track writes, or the channel lacks a return path that a
                capability needs.
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
            spill_bytes=0,  # dirty tracking copies no pages
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
            cleanup.callback(task.interrupt.set)  # runs first, so that the link's thread ends
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
        """Raise the reason why the migration cannot continue, if there is one.

        Raises:
            SnapshotCancelled: it was cancelled. SinkError, DataError: the destination failed.
            SnapshotFailed: RAM was dropped. MachineError: RAM cannot be protected.
        """
        self.task.control.check_cancelled()
        self.capture.check()
        if self.link is not None:
            self.link.check()

    def iterate(self, bytes_per_s: int) -> None:
        """Send one batch at no more than ``bytes_per_s`` (0: unlimited).

        In postcopy, a page request cuts the wait for the limit short.
        """
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
        """Wait until a destination that answers has loaded everything sent so far.

        The guest runs meanwhile. The wait counts towards the destination's measured rate.

        Raises:
            SinkError, DataError: the destination failed to load, or is gone.
            SnapshotCancelled: the migration was cancelled.
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
        """Start the time limit for the destination's first answer."""
        self._answer_by_s = time.monotonic() + _ANSWER_S

    def heard(self) -> bool:
        """Return whether the guest may be stopped: the destination has answered, or need not.

        A program that only stores the stream never answers; it gets the stream unconfirmed, as
        from QEMU.

        Raises:
            SinkError: the destination does not answer although a capability requires it, hung up,
                or does not read what is sent.
            SnapshotCancelled: the migration was cancelled.
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
        """Record how long the guest was stopped."""
        progress = self.task.control.progress
        progress.downtime = downtime
        progress.downtime_ms = self.counters.downtime_ms = downtime.total_ms

    def ask_how_far(self, number: int) -> None:
        """Wait until the destination has loaded everything sent so far.

        A destination that never answers only needs to have taken it from the socket.

        Raises:
            SinkError, DataError: the destination failed to load, is gone, or takes nothing.
            SnapshotCancelled: the migration was cancelled.
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
        """Wait, after the stream's end, until the destination confirms that it has loaded all.

        A destination that never answers only needs to have read it.

        Raises:
            SinkError, DataError: the destination failed to load, is gone, or did not read.
        """
        if self.link is None:
            return
        if not self.link.answered and self.channel.peer is not None:
            wait_stored(self.channel.peer, self.link)
        if self.link.answered:
            self.link.wait_done()
            self.link.check()


def save_devices(live: LiveTransfer, out: io.BytesIO, *, end: io.BytesIO | None) -> None:
    """Save all device states of the stopped guest.

    Guest RAM that the devices write meanwhile becomes dirty and is reported.

    Args:
        end: takes the stream's end; None if the stream goes on.
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
    """Refuse to hand over RAM that has changed since the devices were saved.

    Raises:
        SnapshotFailed: RAM was written, or the RAM blocks changed.
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
