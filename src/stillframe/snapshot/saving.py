"""Saving the RAM of an instant: runs the encoders until every page is in the output."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import ExitStack

from stillframe.capture.ram_capture import RamCapture
from stillframe.errors import MachineError, SnapshotFailed
from stillframe.model import TARGET_PAGE_BYTES
from stillframe.snapshot import faultpoints
from stillframe.snapshot.adaptive_level import AdaptiveLevel
from stillframe.snapshot.comparison import Comparison
from stillframe.snapshot.early_reader import EarlyReader
from stillframe.snapshot.encoders import Encoders, worker_count
from stillframe.snapshot.hold import Hold
from stillframe.snapshot.job import JobControl
from stillframe.snapshot.options import SnapshotOptions
from stillframe.snapshot.output import Output
from stillframe.snapshot.run_delay import VcpuRunDelay
from stillframe.snapshot.stream_framing import StreamFraming
from stillframe.still.page_origins import PageOrigins

_TICK_S = 0.1


class Saving:
    """The saving phase of one job. ``cleanup`` undoes what it sets up.

    Args:
        reader: uses pages before the end of the job.

    Attributes:
        origins: how each page came into the snapshot.
    """

    def __init__(
        self,
        control: JobControl,
        hold: Hold,
        output: Output,
        options: SnapshotOptions,
        reader: EarlyReader,
        cleanup: ExitStack,
    ) -> None:
        self._control = control
        self._hold = hold
        self._output = output
        self._options = options
        self._reader = reader
        self._cleanup = cleanup
        self.origins = PageOrigins(
            [-(-block.used_length_bytes // TARGET_PAGE_BYTES) for block in hold.blocks]
        )

    def run(
        self,
        ram: RamCapture,
        parts: StreamFraming,
        *,
        free_guest: Callable[[], object],
        after_instant: Callable[[], None],
    ) -> None:
        """Write the stream, from head to tail.

        Args:
            free_guest: lets the guest go on, whatever happens to the output.
            after_instant: called once the encoders are making room in the spill.

        Raises:
            SnapshotCancelled, SnapshotFailed, MachineError, SinkError, HostError: saving failed.
        """
        self._output.append_stream(parts.head())
        encoders = self._encoders(ram, parts)
        self._cleanup.callback(self._reader.stop_asking)  # runs after encoders.stop frees it
        self._cleanup.callback(encoders.stop)
        # Runs before encoders.stop: an encoder may hang in a blocked sink; the guest must not wait.
        self._cleanup.callback(free_guest)
        self._reader.begin(parts, ram, encoders.new_asking)
        encoders.start()
        # Only after the start: a vCPU that waits for room in the spill may hold the lock that the
        # monitor needs, and only the encoders make room.
        after_instant()
        self._await_sweep(ram, encoders)
        if self._hold.stays:
            ram.rearm()
            faultpoints.reach("rearmed")
            encoders.drain()
        elif self._options.mode == "background":
            ram.finish()
            faultpoints.reach("unprotected")
            encoders.drain()
        ram.check()
        self._output.append_stream(parts.tail())
        _check_complete(ram)
        while not self._reader.is_ready(_TICK_S):
            self._control.check_cancelled()
            self._reader.check()
        self._reader.finish()

    def _encoders(self, ram: RamCapture, parts: StreamFraming) -> Encoders:
        control, options = self._control, self._options
        if options.max_bandwidth_bytes_per_s is not None:
            control.limit.bytes_per_s = options.max_bandwidth_bytes_per_s
        delay = VcpuRunDelay(self._hold.machine.pid)
        self._cleanup.callback(delay.close)
        if options.parent is not None and ram.copied_whole:
            control.progress.comparison = Comparison(
                options.parent.snapshot, self._hold.blocks, ram.copied_whole
            )
        level = options.compression_level
        return Encoders(
            ram,
            self._output,
            section_id=parts.section_id,
            footers=parts.footers,
            workers=worker_count(options.workers),
            limit=control.limit,
            delay=delay,
            level=AdaptiveLevel(None if level == "adaptive" else level),
            reader=self._reader,
            comparison=control.progress.comparison,
            origins=self.origins,
        )

    def _await_sweep(self, ram: RamCapture, encoders: Encoders) -> None:
        control, machine = self._control, self._hold.machine
        control.enter("active", "saving")
        while not encoders.idle.wait(_TICK_S):
            control.check_cancelled()
            ram.check()
            self._reader.check()
            if not machine.process_alive():
                raise MachineError("the VM exited while its RAM was saved", guest_state="none")
            control.tell()
        encoders.check()
        self._reader.stop_asking()
        control.check_cancelled()
        faultpoints.reach("swept")


def _check_complete(ram: RamCapture) -> None:
    numbers = ram.statistics()
    done, wanted = int(numbers["pages_done"]), int(numbers["pages_wanted"])
    if done != wanted:
        raise SnapshotFailed(
            "the snapshot is incomplete",
            why=f"{done} of {wanted} pages of RAM were saved",
            guest_state="running",
        )
