"""A take that also keeps the complete image of what it saves: in the same pass over RAM while the
guest runs; with ``stop``, only afterwards, from the snapshot."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Sequence
from typing import NamedTuple

import msgspec

from stillframe.capture.ram_capture import RamCapture
from stillframe.errors import DataError, SinkError, StillframeError, UsageError
from stillframe.image.cached import ImageCache
from stillframe.image.new_image import NewImage, why_no_image
from stillframe.image.ram_image import PAGE_BYTES, frames_with_data
from stillframe.image.store_image import store_image
from stillframe.machine import Machine
from stillframe.model import BlockRecord, Manifest
from stillframe.snapshot.early_reader import Asking, NoReader
from stillframe.snapshot.job import JobControl
from stillframe.snapshot.options import SnapshotOptions
from stillframe.snapshot.stream_framing import StreamFraming
from stillframe.snapshot.take import take_snapshot
from stillframe.snapshot.taken import TakenSnapshot
from stillframe.still.frames import BytesLike
from stillframe.still.index import KIND_DATA, PageRun
from stillframe.still.index_builder import PACKED_RUN
from stillframe.still.records import check_run
from stillframe.still.sinks import Sink
from stillframe.still.snapshot import Snapshot
from stillframe.store import open_snapshot
from stillframe.store.locations import absolute, is_there

_SLOW_S = 0.05
"""For a batch of about 1 MiB, which takes a millisecond into the page cache."""


class _Place(NamedTuple):
    """Where a snapshot is. ``parents``: its parents' files, newest first."""

    id: str
    path: str
    parents: list[str]

    def open(self) -> Snapshot:
        snapshot = open_snapshot(self.path, parents=self.parents)
        if snapshot.id != self.id:
            snapshot.close()
            raise DataError(f"{self.path} is another snapshot than a moment ago")
        return snapshot


class ImageKeeping(NoReader):
    """An ``EarlyReader`` that never asks, with the steps before and after it; for one take.

    A failure of the image does not fail the snapshot: it becomes a note there.
    """

    def __init__(self, cache: ImageCache) -> None:
        self._cache = cache
        self._new: NewImage | None = None
        self._manifest: Manifest | None = None
        self._parent: _Place | None = None
        self._came: dict[int, bytearray] = {}
        self._ram: RamCapture | None = None
        self._is_afterwards = False
        self._failure: StillframeError | None = None
        self._lock = threading.Lock()

    def save(
        self, control: JobControl, machine: Machine, sink: Sink, options: SnapshotOptions
    ) -> TakenSnapshot:
        """Take a snapshot as ``take_snapshot`` does.

        Raises:
            UsageError: such a snapshot cannot have an image.
        """
        why = why_no_image(
            vmm=machine.describe().vmm,
            encrypted=options.key is not None,
            for_analysis=options.for_analysis,
        )
        if why is not None:
            raise UsageError(
                "there is no complete image of such a snapshot",
                why=why,
                remedy="leave --image out",
                guest_state="running",
            )
        self._is_afterwards = options.mode == "stop"
        if options.parent is not None:
            parent = options.parent.snapshot
            places = [file.place for file in parent.files[1:]]
            self._parent = _Place(parent.id, parent.description, places)
        return take_snapshot(control, machine, sink, options, self)

    def prepare(self, describe: Callable[[], Manifest]) -> None:
        """Make the image's files."""
        if self._is_afterwards:
            return
        self._manifest = describe()
        try:
            self._new = NewImage(self._cache, self._manifest.blocks)
        except StillframeError as error:  # the cache is not writable, or full
            self._failure = error
            return
        if self._parent is not None:
            blocks = self._manifest.blocks
            self._came = {
                number: bytearray(blocks[number].used_length_bytes // PAGE_BYTES)
                for number in self._new.fds
            }

    def begin(
        self, parts: StreamFraming, ram: RamCapture, new_asking: Callable[[], Asking]
    ) -> None:
        """Remember the capture; there is nothing to ask for."""
        self._ram = ram

    def pages(self, raw: BytesLike, runs: bytes) -> None:
        """Write a section's pages."""
        new = self._new
        if new is None or self._failure is not None:
            return
        began_s = time.monotonic()
        try:
            for block, pages, first, kind, raw_offset in PACKED_RUN.iter_unpack(runs):
                if block in self._came:
                    self._came[block][first : first + pages] = b"\1" * pages
                if kind == KIND_DATA and block in new.fds:
                    new.write(raw, PageRun(block, first, pages, kind, raw_offset), block=block)
            if time.monotonic() - began_s > _SLOW_S:
                self._check_waiting()
        except StillframeError as error:
            with self._lock:
                self._failure = self._failure or error
            new.give_up()  # at once: the snapshot may need the space

    def _check_waiting(self) -> None:
        """Check the spill, as the image's disk is slow: the guest must not wait for spill room
        because of it.

        Raises:
            SinkError: the guest is about to wait.
        """
        ram = self._ram
        if ram is not None and ram.statistics()["spill_used_bytes"] * 2 > ram.spill_bytes:
            raise SinkError(
                "the image's disk is too slow",
                why="the guest would have had to wait for it",
                remedy="make it afterwards: 'stillframe image add'",
            )

    def _copy_rest(self, new: NewImage, blocks: Sequence[BlockRecord], place: _Place) -> None:
        """Copy what an increment leaves to its parents. This may take long; the snapshot already
        has its name."""
        numbers = {block.idstr: number for number, block in enumerate(blocks)}
        with place.open() as parent:
            of_parent = [n for n, b in enumerate(parent.blocks) if numbers.get(b.idstr) in new.fds]
            frames = sorted(frames_with_data(parent.index, of_parent))
            for frame, raw in parent.container.iter_frames(frames):
                for run in parent.index.runs_of_frame(frame):
                    idstr = parent.blocks[run.block].idstr
                    came = self._came.get(numbers.get(idstr, -1))
                    if run.kind != KIND_DATA or came is None:
                        continue
                    check_run(raw, run, idstr, PAGE_BYTES)
                    self._write_missing(new, raw, run, numbers[idstr], came)

    def _write_missing(
        self, new: NewImage, raw: BytesLike, run: PageRun, block: int, came: bytearray
    ) -> None:
        end = min(run.first_page + run.pages, len(came))
        first = came.find(0, run.first_page, end)
        while first >= 0:
            after = came.find(1, first, end)
            after = end if after < 0 else after
            new.write(raw, run, block=block, part=(first, after - first))
            first = came.find(0, after, end)

    def finish_take(self, taken: TakenSnapshot) -> TakenSnapshot:
        """Name the image, now that the snapshot has its name, and note the result."""
        note = "its complete image is kept: 'stillframe image ls'"
        try:
            if self._failure is not None:
                raise self._failure
            self._finish(taken)
        except StillframeError as error:
            note = f"no image is kept: {error}"
        finally:
            self.close()
        return msgspec.structs.replace(taken, notes=(*taken.notes, note))

    def _finish(self, taken: TakenSnapshot) -> None:
        place = absolute(taken.file) if is_there(taken.file) else taken.file  # it may be a pipe
        parents = [] if self._parent is None else [self._parent.path, *self._parent.parents]
        if self._is_afterwards:
            with _Place(taken.id, place, parents).open() as snapshot:
                store_image(self._cache, snapshot, place)
            return
        new, manifest = self._new, self._manifest
        assert new is not None
        assert manifest is not None
        if self._parent is not None:
            self._copy_rest(new, manifest.blocks, self._parent)
        new.commit(taken.id, place, manifest)

    def close(self) -> None:
        """Remove an unfinished image."""
        if self._new is not None:
            self._new.close()
            self._new = None
