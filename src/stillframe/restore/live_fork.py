"""Clones of a running VM that run from the instant on: their VMMs start before it, and their RAM
arrives while it is saved (``image.live_image``)."""

from __future__ import annotations

import os
import threading
import time
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from pathlib import Path

import msgspec

from stillframe.capture.ram_capture import RamCapture
from stillframe.errors import SnapshotFailed
from stillframe.image.end_together import EndTogether
from stillframe.image.fill_record import write_record
from stillframe.image.live_image import LiveImage
from stillframe.image.start import Start, load_clones, ready_clones
from stillframe.model import Manifest
from stillframe.restore.available import check_memory, resident_bytes
from stillframe.restore.identity import keep_renewed
from stillframe.restore.plan_source import LiveSource
from stillframe.restore.records import RestorePlan
from stillframe.restore.restored import RestoredVm, write_vm
from stillframe.restore.start import refuse_to_sleep_forever
from stillframe.restore.vm_set import VmSet, image_files
from stillframe.snapshot.early_reader import Asking
from stillframe.snapshot.stream_framing import StreamFraming
from stillframe.snapshot.taken import TakenSnapshot
from stillframe.still.frames import BytesLike


class LiveFork:
    """An ``EarlyReader`` that starts clones. They are in ``vms`` once the job is done and
    ``let_go`` was called; leaving the ``with`` block before that ends them.

    Args:
        plans: one per clone, on an image; checked.
        source: what they were made from.
        kept_in: the snapshot's path, if it is kept.
        record_path: the fill record, which shows others how far the image is.
        on_running: called when all clones run.
        owns: descriptors that every clone holds as long as it lives.
        leases: directories of disk images that they need.
        began_s: start of the whole fork (monotonic clock).
    """

    def __init__(
        self,
        plans: Sequence[RestorePlan],
        source: LiveSource,
        *,
        kept_in: str | None,
        record_path: Path,
        on_running: Callable[[list[RestoredVm]], None] | None,
        owns: Sequence[int],
        leases: Sequence[Path],
        began_s: float,
    ) -> None:
        self._set = VmSet(
            plans, path=kept_in or "", parent=source.description, began_s=began_s,
            leases=leases, owns=owns,
        )  # fmt: skip
        self._source = source
        self._record_path = record_path
        self._on_running = on_running
        self._until_started, self._until_complete = ExitStack(), ExitStack()
        self._on_failure = ExitStack()
        self._image: LiveImage | None = None
        self._together: EndTogether | None = None
        self._starts: list[Start] = []
        self._thread: threading.Thread | None = None
        self._is_kept = False
        self.vms: list[RestoredVm] = []

    def __enter__(self) -> LiveFork:
        return self

    def __exit__(self, *_error: object) -> None:
        self._on_failure.close()
        self._until_started.close()

    @property
    def _live(self) -> LiveImage:
        assert self._image is not None
        return self._image

    def start(self) -> None:
        """Start the clones' VMMs; they get ready while the snapshot job does.

        Raises:
            HostError, BusyError: they cannot be started.
        """
        planned = self._source.manifest
        assert planned.machine is not None
        numbers = self._set.plans[0].image.blocks
        lengths = [planned.blocks[number].used_length_bytes for number in numbers]
        check_memory(min(sum(lengths), resident_bytes(planned.machine.pid)))
        self._set.make_places(self._until_started, self._on_failure)
        image = self._image = LiveImage(planned.blocks, numbers)
        self._on_failure.callback(image.close)
        self._on_failure.callback(self._until_complete.close)
        self._on_failure.callback(self._join)
        self._on_failure.callback(self._part)
        self._on_failure.callback(self._set.kill)
        self._set.put_on_image(dict(zip(numbers, image.files.fds, strict=True)))
        for number in range(len(self._set.plans)):
            self._set.start(number, image.inherited)
        pidfds = [os.pidfd_open(emulator.pid) for emulator in self._set.emulators]
        try:
            self._together = EndTogether(pidfds)
        finally:
            for fd in pidfds:
                os.close(fd)

    def prepare(self, describe: Callable[[], Manifest]) -> None:
        """Wait until the clones' VMMs wait for their stream.

        Raises:
            SnapshotFailed: the VM has changed since the clones were planned.
            HostError, MachineError, RefusedError: a clone does not start.
        """
        manifest, planned = describe(), self._source.manifest
        assert manifest.machine is not None
        assert planned.machine is not None
        if (manifest.blocks, manifest.captured_disks, manifest.machine.command_line) != (
            planned.blocks, planned.captured_disks, planned.machine.command_line,
        ):  # fmt: skip
            raise SnapshotFailed(
                "the VM's devices changed while its clones were prepared",
                remedy="fork it again", guest_state="running",
            )  # fmt: skip
        assert self._together is not None
        self._starts = ready_clones(self._live, self._set.emulators, self._set.note_ports)
        self._together.await_ready()
        self._until_started.close()

    def begin(
        self, parts: StreamFraming, ram: RamCapture, new_asking: Callable[[], Asking]
    ) -> None:
        """Start the thread that lets the clones run: the instant is fixed."""
        self._live.start(parts, ram, new_asking)
        self._thread = threading.Thread(target=self._load, args=(parts,), name="stillframe-fork")
        self._thread.start()

    def _load(self, parts: StreamFraming) -> None:
        try:
            for start in self._starts:
                refuse_to_sleep_forever(lambda: parts.sections, self._set.plans[0], start.qmp)
            stream = self._live.small_stream(parts)
            started = load_clones(self._live, self._starts, stream)
            self._until_complete.callback(
                os.close, write_record(self._record_path, self._live.record())
            )
            self._until_complete.callback(self._record_path.unlink, missing_ok=True)
            image_path = str(self._record_path)
            files = image_files(self._live.files)
            self.vms = [
                self._set.restored(n, one, image_path, files) for n, one in enumerate(started)
            ]
            for vm in self.vms:
                write_vm(vm)
            if self._on_running is not None:
                self._on_running(self.vms)
        except BaseException as error:  # noqa: BLE001 - handed to the job
            self._live.fail(error)

    def _part(self) -> None:
        if self._together is not None:
            self._together.part()

    def _join(self) -> None:
        if self._thread is not None:
            self._live.fail(SnapshotFailed("the fork was given up", guest_state="running"))
            self._thread.join()
        for start in self._starts:
            start.close()

    def pages(self, raw: BytesLike, runs: bytes) -> None:
        """See ``LiveImage.pages``."""
        self._live.pages(raw, runs)

    def check(self) -> None:
        """Raise the error that keeps a clone from running, if there is one."""
        self._live.check()

    def stop_asking(self) -> None:
        """Stop asking for pages: all of RAM is claimed."""
        self._live.stop_asking()

    def is_ready(self, timeout_s: float) -> bool:
        """Whether the clones run, or one has failed, which :meth:`finish` raises."""
        assert self._thread is not None
        self._thread.join(timeout_s)
        return not self._thread.is_alive()

    def finish(self) -> None:
        """Note that all of RAM is there and that the clones run.

        Raises:
            HostError, MachineError, RefusedError: a clone does not run.
        """
        self._live.finish()
        self._until_complete.close()
        resident_ms = (time.monotonic() - self._set.began_s) * 1000
        self.vms = [msgspec.structs.replace(vm, resident_ms=resident_ms) for vm in self.vms]

    def keep(self) -> None:
        """Note that all went well: from here on the clones do not end with the job."""
        self._is_kept = True

    def undo(self) -> None:
        """End the clones, unless they were kept: their disks are about to be written to."""
        if not self._is_kept:
            self._on_failure.close()

    def let_go(self, taken: TakenSnapshot) -> list[RestoredVm]:
        """Let the clones live on without this process.

        Args:
            taken: the job's result; its id is empty if nothing was kept.
        """
        self.vms = [
            msgspec.structs.replace(vm, snapshot_id=taken.id, notes=(*vm.notes, *taken.notes))
            for vm in self.vms
        ]
        self._part()
        self._on_failure.pop_all()
        self._set.let_go()
        return keep_renewed(self.vms)
