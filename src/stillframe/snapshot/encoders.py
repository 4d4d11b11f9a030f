"""Worker threads: take batches from the capture, compress, digest, and append them.

Each worker does the whole way itself, so the memory in flight is one batch a worker.
"""

from __future__ import annotations

import os
import threading
import time

from stillframe.errors import StillframeError
from stillframe.memory.ram_capture import RamCapture
from stillframe.snapshot import faultpoints
from stillframe.snapshot.adaptive_level import AdaptiveLevel
from stillframe.snapshot.bandwidth import BandwidthLimit
from stillframe.snapshot.yielding import VcpuDelay, step_back
from stillframe.store.writer import SnapshotWriter

_MOST_WORKERS = 8


def worker_count(wanted: int | None) -> int:
    """Threads that encode: as many as processors that we may use, at most eight."""
    if wanted is not None:
        return max(1, wanted)
    return max(1, min(_MOST_WORKERS, len(os.sched_getaffinity(0))))


class Encoders:
    """A group of workers over one capture and one writer."""

    def __init__(
        self,
        ram: RamCapture,
        writer: SnapshotWriter,
        *,
        section_id: int,
        workers: int,
        limit: BandwidthLimit,
        delay: VcpuDelay,
        level: AdaptiveLevel,
    ) -> None:
        self._ram = ram
        self._delay = delay
        self._level = level
        self._writer = writer
        self._section_id = section_id
        self._limit = limit
        self._stop = threading.Event()
        self._over = threading.Event()
        """Set when there is nothing more to begin, so that nobody goes on resting."""
        self._failure: BaseException | None = None
        self._left = workers
        self._lock = threading.Lock()
        self.idle = threading.Event()
        """Set when every worker has ended, by finding nothing more or by an error."""
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
            step_back()
            self.drain(self._delay if extra else None)
        except BaseException as error:  # noqa: BLE001 - handed to whoever waits
            with self._lock:
                self._failure = self._failure or error
            self._stop.set()
            self._over.set()
        finally:
            with self._lock:
                self._left -= 1
                if self._left == 0:
                    self.idle.set()

    def drain(self, delay: VcpuDelay | None = None) -> None:
        """Encode batches until there are none (in the calling thread); rest as ``delay`` says."""
        worker = self._ram.worker(self._section_id)
        while not self._stop.is_set() and worker.next():
            faultpoints.reach("first-batch")
            began = time.monotonic()
            frame = self._writer.encode(worker.raw, self._level.next_level())
            encoded = time.monotonic()
            self._limit.wait(len(frame.data), self._stop)
            self._writer.append(frame, worker.runs)
            self._level.note(encode_s=encoded - began, write_s=time.monotonic() - encoded)
            if delay is not None:
                delay.rest(self._over)
        self._over.set()

    def check(self) -> None:
        """Raise what made a worker end."""
        if self._failure is not None:
            if isinstance(self._failure, StillframeError) and self._failure.guest_state == "none":
                self._failure.guest_state = "running"
            raise self._failure

    def stop(self) -> None:
        """Make the workers end after their present batch, and wait for them."""
        self._stop.set()
        self._over.set()
        for thread in self._threads:
            if thread.ident is not None:
                thread.join()
