"""Encoder threads: take batches from the capture, compress, digest, and append them.

Each thread carries its batch all the way, so the memory in flight is one batch per thread.
"""

from __future__ import annotations

import os
import threading
import time
from collections.abc import Callable, Sequence

from stillframe.capture._capture import Worker
from stillframe.capture.ram_capture import RamCapture
from stillframe.errors import StillframeError
from stillframe.snapshot import faultpoints
from stillframe.snapshot.adaptive_level import AdaptiveLevel
from stillframe.snapshot.comparison import Comparison
from stillframe.snapshot.early_reader import Asking, EarlyReader
from stillframe.snapshot.output import Output
from stillframe.snapshot.rate import BandwidthLimit
from stillframe.snapshot.run_delay import VcpuRunDelay, lower_priority
from stillframe.still.frames import BytesLike
from stillframe.still.index import PageRun
from stillframe.still.page_origins import PageOrigins
from stillframe.vmstate.footers import FOOTER_BYTES

_MOST_WORKERS = 8


def worker_count(wanted: int | None) -> int:
    """Return the number of encoder threads: ``wanted``, or one per usable CPU, at most eight."""
    if wanted is not None:
        return max(1, wanted)
    return max(1, min(_MOST_WORKERS, len(os.sched_getaffinity(0))))


class _Asking:
    """An ``Asking`` over one worker: copies the pages that a reader asks for."""

    def __init__(self, worker: Worker, hand_on: Callable[[Worker], None]) -> None:
        self._worker = worker
        self._hand_on = hand_on

    def take(self, block: int, first_page: int, pages: int) -> None:
        if self._worker.take(block, first_page, pages):
            self._hand_on(self._worker)

    def take_spilled(self) -> None:
        while self._worker.take_spilled():
            self._hand_on(self._worker)


class Encoders:
    """A group of encoder threads over one capture and one output."""

    def __init__(
        self,
        ram: RamCapture,
        output: Output,
        *,
        section_id: int,
        footers: bool,
        workers: int,
        limit: BandwidthLimit,
        delay: VcpuRunDelay,
        level: AdaptiveLevel,
        reader: EarlyReader,
        comparison: Comparison | None = None,
        origins: PageOrigins | None = None,
    ) -> None:
        self._ram = ram
        self._delay = delay
        self._level = level
        self._output = output
        self._reader = reader
        self._section_id = section_id
        self._footers = footers
        self._comparison = comparison
        self._origins = origins
        self._raw_end = None if footers else -FOOTER_BYTES
        self._limit = limit
        self._stop = threading.Event()
        self._over = threading.Event()
        """Set when no batch is left to start, so that resting threads wake up."""
        self._failure: BaseException | None = None
        self._left = workers
        self._lock = threading.Lock()
        self.idle = threading.Event()
        """Set when every thread has ended, because nothing was left or by an error."""
        self._threads = [
            threading.Thread(
                target=self._run, args=(n > 0,), name=f"stillframe-encoder-{n}", daemon=True
            )
            for n in range(workers)
        ]

    def start(self) -> None:
        for thread in self._threads:
            thread.start()

    def _run(self, extra: bool) -> None:
        try:
            lower_priority()
            self.drain(self._delay if extra else None)
        except BaseException as error:  # noqa: BLE001 - check() raises it
            with self._lock:
                self._failure = self._failure or error
            self._stop.set()
            self._over.set()
        finally:
            with self._lock:
                self._left -= 1
                if self._left == 0:
                    self.idle.set()

    def drain(self, delay: VcpuRunDelay | None = None) -> None:
        """Encode batches in the calling thread until none are left; rest as ``delay`` says."""
        worker = self._ram.worker(self._section_id)
        while not self._stop.is_set() and worker.next():
            faultpoints.reach("first-batch")
            self._hand_on(worker)
            if delay is not None:
                delay.rest(self._over)
        self._over.set()

    def new_asking(self) -> Asking:
        """Make an ``Asking`` for one thread of the reader."""
        return _Asking(self._ram.worker(self._section_id), self._hand_on)

    def _hand_on(self, worker: Worker) -> None:
        self._reader.pages(worker.raw, worker.runs)
        if self._origins is not None:
            self._origins.add(worker.origins)
        began = time.monotonic()
        raw, runs = self._changed(worker.raw[: self._raw_end], worker.runs)
        if not runs:
            return
        frame = self._output.encode(raw, self._level.next_level())
        encoded = time.monotonic()
        self._limit.wait(len(frame.data), self._stop)
        self._output.append(frame, runs)
        self._level.note(encode_s=encoded - began, write_s=time.monotonic() - encoded)

    def _changed(self, raw: memoryview, runs: bytes) -> tuple[BytesLike, Sequence[PageRun] | bytes]:
        if self._comparison is None:
            return raw, runs
        return self._comparison.changed(raw, runs, self._section_id, footer=self._footers)

    def check(self) -> None:
        """Raise the error that ended a thread, if any."""
        if self._failure is not None:
            if isinstance(self._failure, StillframeError) and self._failure.guest_state == "none":
                self._failure.guest_state = "running"
            raise self._failure

    def stop(self) -> None:
        """Make the threads end after their current batch, and join them."""
        self._stop.set()
        self._over.set()
        for thread in self._threads:
            if thread.ident is not None:
                thread.join()
