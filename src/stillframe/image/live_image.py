"""A running VM's RAM at one point in time, as an image that its clones map while it is saved.

Pages that the pipeline copies are placed in the image first. A page that a clone waits for is
claimed in the VM's own RAM, out of turn. A page that the VM was about to write is in the spill, and
is requested from there.

No other process can go on if this one dies: the VM overwrites what is not copied by then. So the
clones end with this process until their image is complete (``end_together``).
"""

from __future__ import annotations

import os
import threading
import time
from array import array
from collections.abc import Callable, Mapping, Sequence

from stillframe.capture.ram_capture import RamCapture
from stillframe.errors import HostError, MachineError
from stillframe.image import _fill
from stillframe.image.clone import Clone, watch
from stillframe.image.fill_record import FillRecord
from stillframe.image.ram_image import ImageFiles, no_memory
from stillframe.image.small_stream import part_of_runs
from stillframe.model import TARGET_PAGE_BYTES, BlockRecord
from stillframe.snapshot.early_reader import Asking
from stillframe.snapshot.stream_framing import StreamFraming
from stillframe.still.frames import BytesLike
from stillframe.still.index import KIND_DATA, PageRun
from stillframe.still.index_builder import PACKED_RUN

_ASKED_PAGES = 64
"""Copied together for one fault, as the neighbours are soon wanted, too."""
_SMALL_STEP_PAGES = 128
_AGAIN_MS = 2
_RETRY_S = 0.05
_NO_MEMORY_S = 30.0


class LiveImage:
    """An image of some blocks of a VM that is about to be captured.

    Call :meth:`begin` once the clones' VMMs run, and :meth:`start` at the point in time;
    :meth:`pages` gets all of RAM. Then :meth:`stop_asking` and :meth:`finish`; or :meth:`close` at
    any time, after the clones have been ended.

    Args:
        blocks: all blocks of the VM. numbers: of those that get a file.

    Raises:
        HostError: no userfaultfd, or no memory.
    """

    def __init__(self, blocks: Sequence[BlockRecord], numbers: Sequence[int]) -> None:
        self.files = ImageFiles.make_files(blocks, numbers)
        self._blocks = tuple(blocks)
        self._clones: list[Clone] = []
        self._waiting: list[_fill.Waiting] = []
        self._ram: RamCapture | None = None
        self._asking: Asking | None = None
        self._asking_lock = threading.Lock()
        self._stop_fd = os.eventfd(0, os.EFD_CLOEXEC | os.EFD_NONBLOCK)
        self._thread: threading.Thread | None = None
        self._failure: BaseException | None = None
        self._are_loaded = False
        self._section_id = self._data_bytes = 0
        self._small = [n for n in range(len(blocks)) if n not in self.files.numbers]
        self._small_left = sum(self._whole(number) for number in self._small)
        self._small_parts: list[bytes] = []
        self._small_changed = threading.Condition()

    def _whole(self, number: int) -> int:
        return -(-self._blocks[number].used_length_bytes // TARGET_PAGE_BYTES)

    @property
    def inherited(self) -> tuple[int, ...]:
        """Descriptors that the VMs inherit."""
        return self.files.inherited

    def begin(self, vms: Mapping[int, tuple[int, int] | None]) -> None:
        """Watch the VMs, whose guests have not run and which have loaded nothing.

        Args:
            vms: process ids, and their gadgets as for ``clone.watch``.

        Raises:
            RefusedError, HostError, BusyError, MachineError: as ``clone.watch``.
        """
        for pid, gadgets in vms.items():
            self._clones.append(watch(self.files, pid, gadgets))
        self.files.empty()
        self._waiting = [clone.waiting for clone in self._clones]

    def sweep(self) -> None:
        """Note that the clones have loaded their state. The pipeline sweeps anyway."""
        self._are_loaded = True

    def check(self) -> None:
        """Raise the error that keeps pages from the clones.

        Raises:
            MachineError: the clones have ended. Otherwise as ``RamCapture.check``, or as the
                output.
        """
        if self._failure is not None:
            raise self._failure
        if self._are_loaded and self._all_ended():  # before, each start reports its own end
            raise MachineError("all clones have ended", guest_state="running")

    def _all_ended(self) -> bool:
        return bool(self._waiting) and all(waiting.ended for waiting in self._waiting)

    def start(
        self, parts: StreamFraming, ram: RamCapture, new_asking: Callable[[], Asking]
    ) -> None:
        """Serve the clones' faults and fetch the small blocks, now that the point in time is
        fixed."""
        self._ram, self._section_id = ram, parts.section_id
        self._asking = new_asking()
        for number, runs in enumerate(ram.populated_runs()):
            position = self.files.position(number)
            if position is not None:
                self.files.pages[position].mark_data(
                    array("Q", [first for first, _ in runs]),
                    array("I", [pages for _, pages in runs]),
                    bytes((KIND_DATA,)) * len(runs),
                )
                self._data_bytes += sum(pages for _, pages in runs) * TARGET_PAGE_BYTES
        self._thread = threading.Thread(target=self._run, name="stillframe-clones", daemon=True)
        self._thread.start()

    def record(self) -> FillRecord:
        """Return the record by which others see the progress."""
        return FillRecord(
            snapshot="",
            snapshot_id="",
            blocks=self.files.numbers,
            files=self.files.identities,
            data_bytes=self._data_bytes,
            clones=tuple(clone.place for clone in self._clones),
        )

    # Incoming pages, from any thread

    def pages(self, raw: BytesLike, packed: bytes) -> None:
        """Place a section's pages, and wake the faults on them; see ``EarlyReader.pages``.

        Raises:
            SnapshotFailed, MachineError: as ``RamCapture.check_copied``: nothing was placed.
            HostError: no memory became free within half a minute.
        """
        assert self._ram is not None
        self._ram.check_copied()
        bounds: dict[int, tuple[int, int]] = {}
        small: list[PageRun] = []
        for block, pages, first, kind, raw_offset in PACKED_RUN.iter_unpack(packed):
            run = PageRun(block, first, pages, kind, raw_offset)
            position = self.files.position(block)
            if position is None:
                small.append(run)
                continue
            if kind == KIND_DATA:
                self._place(raw, run)
            else:
                self.files.pages[position].mark_zero(first, pages)
            low, high = bounds.get(position, (first, first))
            bounds[position] = (min(low, first), max(high, first + pages))
        for position, (low, high) in bounds.items():
            for waiting in self._waiting:
                waiting.wake(position, low, high - low)
        if small:
            part = b"".join(part_of_runs(self._blocks, self._section_id, raw, small))
            with self._small_changed:
                self._small_parts.append(part)
                self._small_left -= sum(run.pages for run in small)
                self._small_changed.notify_all()

    def _place(self, raw: BytesLike, run: PageRun) -> None:
        deadline_s = time.monotonic() + _NO_MEMORY_S
        while (rc := self.files.place(raw, run)) < 0:
            if self._ram is not None:
                self._ram.check_copied()
            if time.monotonic() > deadline_s:
                raise no_memory(-rc)
            time.sleep(_RETRY_S)

    def small_stream(self, parts: StreamFraming) -> bytes:
        """Return the clones' stream, once the small blocks are there.

        Raises:
            StillframeError: as :meth:`check`.
        """
        with self._small_changed:
            self._small_changed.wait_for(lambda: not self._small_left or self._failure)
            self.check()
            return b"".join((parts.head(), *self._small_parts, parts.tail()))

    # Requested pages

    def _run(self) -> None:
        try:
            self._fetch_small()
            self._serve()
        except BaseException as error:  # noqa: BLE001 - raised by ``check``
            self.fail(error)

    def fail(self, error: BaseException) -> None:
        """Make ``check`` raise this error from now on, unless there is an earlier one."""
        with self._small_changed:
            self._failure = self._failure or error
            self._small_changed.notify_all()

    def _fetch_small(self) -> None:
        for number in self._small:
            whole = self._whole(number)
            for first in range(0, whole, _SMALL_STEP_PAGES):
                pages = min(_SMALL_STEP_PAGES, whole - first)
                self._take(number, first, pages)

    def _take(self, number: int, first: int, pages: int) -> None:
        with self._asking_lock:
            if self._asking is not None:
                self._asking.take(number, first, pages)

    def _take_spilled(self) -> None:
        with self._asking_lock:
            if self._asking is not None and self._ram is not None:
                self._asking.take_spilled()
                self._ram.hand_on_spilled()  # for the next time

    def _serve(self) -> None:
        lacking: set[tuple[int, int]] = set()
        while True:
            asks_again = bool(lacking) or self._small_left > 0
            faults = _fill.serve(self._waiting, self._stop_fd, _AGAIN_MS if asks_again else -1)
            if faults is None:
                return
            for clone, position, page, failure in faults:
                if failure:
                    time.sleep(_RETRY_S)  # no memory for a zero page: the fault repeats
                    self._waiting[clone].wake(position, page)
                else:
                    lacking.add((position, page))
            lacking = {wanted for wanted in lacking if self._lacks(*wanted)}
            for position, page in sorted(lacking):
                first = page & -_ASKED_PAGES
                pages = min(_ASKED_PAGES, self.files.pages[position].count - first)
                self._take(self.files.numbers[position], first, pages)
            # Pages claimed by the sweep are placed soon; those claimed by faults are in the spill.
            if self._small_left or any(self._lacks(*wanted) for wanted in lacking):
                self._take_spilled()
            if self._all_ended():
                return

    def _lacks(self, position: int, page: int) -> bool:
        return self.files.pages[position].lacks(page)

    # The end

    def stop_asking(self) -> None:
        """Claim no more pages, as all are claimed; incoming pages are still served."""
        with self._asking_lock:
            self._asking = None

    def finish(self) -> None:
        """Release the clones: the image is complete, and they have loaded their state."""
        self._stop()
        self.check()
        for clone in self._clones:
            clone.release()
        self._clones = []
        self.files.seal()
        self.files.close()

    def close(self) -> None:
        """Give up; the clones must have been ended. Does nothing after :meth:`finish`."""
        self.fail(HostError("the fork was given up", guest_state="running"))
        self.stop_asking()
        self._stop()
        for clone in self._clones:
            clone.close()
        self._clones = []
        self.files.close()

    def _stop(self) -> None:
        if self._thread is not None:
            os.eventfd_write(self._stop_fd, 1)
            self._thread.join()
            self._thread = None
        if self._stop_fd >= 0:
            os.close(self._stop_fd)
            self._stop_fd = -1
