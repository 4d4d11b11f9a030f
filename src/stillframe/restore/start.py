"""The execution of restore plans: starting VMs, on an image or by the stream, until they run."""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from pathlib import Path

import msgspec

from stillframe.errors import DataError, HostError, RefusedError, StillframeError
from stillframe.image.filling import Filling
from stillframe.image.small_stream import small_stream
from stillframe.image.start import Start, Started, start_clones
from stillframe.qmp.client import QmpClient
from stillframe.restore.agents import thaw
from stillframe.restore.available import check_memory
from stillframe.restore.captured_disks import check_captured
from stillframe.restore.clock import set_back
from stillframe.restore.complete_image import CompleteImage, find_complete, on_complete
from stillframe.restore.feed import Progress, feed
from stillframe.restore.plan import check_plan, plan_restore
from stillframe.restore.planners import Clock
from stillframe.restore.read_right import let_read
from stillframe.restore.records import RestorePlan, streamed_note
from stillframe.restore.restored import (
    IMAGE_NAME,
    ImageFile,
    RestoredVm,
    hand_over,
    write_vm,
)
from stillframe.restore.store_use import end_if_removed
from stillframe.restore.untouched import memory_needed_bytes, touched_pages
from stillframe.restore.vm_set import VmSet, image_files, make_disks
from stillframe.still.sealing import unlock_with
from stillframe.still.snapshot import Snapshot
from stillframe.store import open_snapshot
from stillframe.store.keys import Keys
from stillframe.store.locations import real
from stillframe.store.named import locate
from stillframe.vmstate.devices import GLOBAL_STATE_IDSTR, DeviceSection, find_section, run_state

_POLL_S = 0.1


def restore(
    path: str | os.PathLike[str],
    *,
    name: str | None = None,
    qmp_socket: str | None = None,
    trust: bool = False,
    extra_args: Sequence[str] = (),
    program: str | None = None,
    paused: bool = False,
    directory: Path | None = None,
    clock: Clock = "host",
    verify_disks: bool = False,
    stream: bool = False,
    fill: bool = False,
    wait: bool = False,
    keys: Keys | None = None,
    on_progress: Progress | None = None,
) -> RestoredVm:
    """Start a new VM from a snapshot. The original VM is not touched.

    The new VM runs if the old one ran at the instant and ``paused`` is not set; it does not depend
    on the caller's process afterwards. Its disks are overlays over those that the snapshot holds,
    otherwise over the recorded ones in their present state. It runs at once on an image: a complete
    one of the cache, if there is one (``take(image=True)``); otherwise one in memory, which a
    separate process fills in the background. Where no image is possible, all of RAM comes before
    the VM runs, and a note says why.

    Args:
        name: of the new VM; default: the old VM's name.
        qmp_socket: where its monitor listens; default: a private place.
        trust: the caller has read the plan, and answers for a file that is not the caller's
            own, or that comes from elsewhere and touches this host.
        extra_args: the caller's QEMU options, which replace recorded ones or add to them.
        program: another QEMU than the recorded one, a name or a path.
        directory: to be created for sockets, log and overlays; default: the usual places.
        clock: what its RTC shows: the host's time, or the instant's and on from there.
        verify_disks: read the snapshot's disks in full to check their digests.
        stream: load all of RAM before the VM runs, in any case.
        fill: use an image in memory even if the cache has a complete one: a VM on a complete image
            can be saved only while it is stopped. No effect with ``stream``.
        wait: until all of RAM is there; otherwise call ``wait_resident()`` of the returned VM.
        keys: for an encrypted snapshot: only authentic data reaches the new VM.
        on_progress: called with the stream bytes done and the stream bytes in all.

    Raises:
        NotFoundError: no such snapshot, or a file of the VM is gone.
        TrustError: the caller must read the plan first. RefusedError: an option cannot be used.
        UsageError, HostError, DataError: the arguments, the host, the snapshot.
        LockedError: the snapshot is encrypted, and none of the keys opens it.
        MachineError: QEMU rejected it; its own words. No VM and no file is left behind.
    """
    began_s = time.monotonic()
    located = locate(path, keys=keys)
    with open_snapshot(located, keys) as snapshot:
        plan = plan_restore(
            snapshot,
            name=name,
            qmp_socket=qmp_socket,
            extra_args=extra_args,
            program=program,
            paused=paused,
            directory=directory,
            clock=clock,
            stream=stream,
        )
        check_plan(plan, trust=trust)
        work = Restoring(
            [plan], snapshot, located, began_s=began_s, verify_disks=verify_disks, fill=fill
        )
        vms = work.run(Path(plan.directory, IMAGE_NAME), wait=wait, on_progress=on_progress)
        if snapshot.manifest.quiesced:
            vms = thaw(vms)
    end_if_removed(located, vms)
    return vms[0]


class Restoring:
    """The execution of checked plans: VMs of one snapshot, which share an image if they can.

    Args:
        path: of the snapshot. began_s: start of the whole restore (monotonic clock).
        verify_disks: read the snapshot's disks in full to check their digests.
        leases: disk directories that the VMs share; killing the last VM removes them.
        fill: use an image in memory even if there is a complete one.
        parent: the running VM that the snapshot is of, if the snapshot is not kept.
    """

    def __init__(
        self,
        plans: Sequence[RestorePlan],
        snapshot: Snapshot,
        path: str | os.PathLike[str],
        *,
        began_s: float,
        leases: Sequence[Path] = (),
        verify_disks: bool = False,
        fill: bool = False,
        parent: str = "",
    ) -> None:
        self._fill_anyway = fill
        self._snapshot = snapshot
        self._path = real(path)
        self._verify_disks = verify_disks
        self._set = VmSet(
            plans, path="" if parent else self._path, snapshot_id=snapshot.id, parent=parent,
            began_s=began_s, leases=leases,
        )  # fmt: skip

    def run(
        self,
        record_path: Path,
        *,
        wait: bool,
        on_progress: Progress | None = None,
        owns: Sequence[int] = (),
        on_running: Callable[[list[RestoredVm]], None] | None = None,
    ) -> list[RestoredVm]:
        """Start all the VMs.

        Args:
            record_path: where the image's fill record goes.
            wait: until all of RAM is there.
            owns: descriptors that every VM holds as long as it lives.
            on_running: called once all VMs run.

        Raises:
            HostError, MachineError, DataError, RefusedError: as :func:`restore`; no VM is left.
        """
        vms = self._set
        vms.owns = tuple(owns)
        used = {disk.captured for plan in vms.plans for disk in plan.overlays if disk.captured}
        manifest = self._snapshot.manifest
        vms.disk_notes = tuple(
            check_captured(manifest, self._path, only=used, digests=self._verify_disks)
        )
        with ExitStack() as until_started, ExitStack() as on_failure:
            complete = None
            if not self._fill_anyway:
                complete = find_complete(vms.plans, self._snapshot)
            if complete is None:
                check_memory(memory_needed_bytes(self._snapshot))
            else:
                until_started.callback(complete.close)
            for plan in vms.plans:
                if plan.run_as is not None:
                    let_read(manifest, self._path, used, plan.run_as.uid)
            vms.make_places(until_started, on_failure)
            on_failure.callback(record_path.unlink, missing_ok=True)
            on_failure.callback(vms.kill)
            filling, files, started = self._start(complete, record_path, on_progress)
            if filling is not None:
                on_failure.callback(filling.close, keeps_working_set=False)
            until_started.close()
            image_path = str(record_path) if filling else None
            resident_ms = None if filling else vms.since_begin_ms()
            restored = [
                msgspec.structs.replace(
                    vms.restored(n, one, image_path, files), resident_ms=resident_ms
                )
                for n, one in enumerate(started)
            ]
            for vm in restored:
                write_vm(vm)  # before another process fills: the record says which VM to help
            if on_running is not None:
                on_running(restored)
            if filling is not None:
                resident_ms = self._fill(filling, record_path, wait, on_progress)
            on_failure.pop_all()
        vms.let_go()
        return [msgspec.structs.replace(vm, resident_ms=resident_ms) for vm in restored]

    def _start(
        self, complete: CompleteImage | None, record_path: Path, on_progress: Progress | None
    ) -> tuple[Filling | None, tuple[ImageFile, ...], list[Started]]:
        """Start the best way that works; return what fills the image, its files, and the VMs."""
        if complete is not None and (started := self._on_complete(complete)):
            return None, complete.image_files, started
        filling, started = self._on_image(record_path)
        if filling is not None:
            return filling, image_files(filling.image), started
        numbers = range(len(self._set.plans))
        return None, (), [self._by_stream(number, on_progress) for number in numbers]

    def _on_complete(self, complete: CompleteImage) -> list[Started]:
        """Start on a complete image; if that fails, return nothing: the VMs are started anew."""
        planned = self._set.plans
        try:
            self._set.plans = on_complete(planned, complete)
            self._set.put_on_image(complete.files)
            for number in range(len(planned)):
                self._set.start(number, complete.inherited)
            complete.prefetch(self._snapshot, self._path)
            self._announce(complete.image_files)
            stream = self._small_stream(complete.plan.blocks)
            return start_clones(complete, self._set.emulators, stream, inspect=self._inspect)
        except BaseException as error:
            if not isinstance(error, StillframeError) or isinstance(error, DataError):
                raise
            note = f"not on its complete image: {error}"
            self._start_over([msgspec.structs.replace(p, notes=(*p.notes, note)) for p in planned])
            check_memory(memory_needed_bytes(self._snapshot))
            return []

    def _start_over(self, planned: Sequence[RestorePlan]) -> None:
        """Kill the VMs and remake their disks: no guest keeps what it did before it starts anew."""
        self._set.kill()
        for plan in planned:
            Path(plan.log_path).unlink(missing_ok=True)
            make_disks(plan)
        self._set.plans = list(planned)

    def _on_image(self, record_path: Path) -> tuple[Filling | None, list[Started]]:
        """Start on an image in memory; return nothing if the VMs must be streamed. The plans'
        notes then say why."""
        image = self._set.plans[0].image
        if image.streamed:
            return None, []
        plans, filling = self._set.plans, None
        try:
            parents = [file.place for file in self._snapshot.files[1:]]
            filling = Filling.make(
                self._path,
                image.blocks,
                record_path,
                unlock=unlock_with(self._snapshot.secrets),
                parents=parents,
                like=self._snapshot,
            )
            if filling.snapshot.id != self._snapshot.id:
                raise DataError(f"{self._path} is another snapshot than a moment ago")
            files = dict(zip(image.blocks, filling.image.fds, strict=True))
            self._set.put_on_image(files)
            for number in range(len(plans)):
                self._set.start(number, filling.inherited)
            filling.prefetch()
            self._announce(image_files(filling.image), str(record_path))
            stream = self._small_stream(image.blocks)
            return filling, start_clones(
                filling, self._set.emulators, stream, inspect=self._inspect
            )
        except BaseException as error:
            if filling is not None:
                filling.close(keeps_working_set=False)
            if not isinstance(error, StillframeError) or isinstance(error, DataError):
                raise
            # If the image is not to blame, the stream fails the same way.
            record_path.unlink(missing_ok=True)
            note = streamed_note(str(error))
            self._start_over([msgspec.structs.replace(p, notes=(*p.notes, note)) for p in plans])
            return None, []

    def _announce(self, files: tuple[ImageFile, ...], image_path: str | None = None) -> None:
        """Write the records early: should this process die, others find the VMs and help them."""
        for number, emulator in enumerate(self._set.emulators):
            begun = Started(
                pid=emulator.pid, state="inmigrate", ready_ms=0, watched_ms=0, running_ms=None
            )
            write_vm(self._set.restored(number, begun, image_path, files))

    def _small_stream(self, blocks: Sequence[int]) -> bytes:
        shift_ns = self._set.plans[0].clock_shift_ns
        clock_is_set = not shift_ns

        def edit(piece: bytes) -> bytes:
            nonlocal clock_is_set
            if not clock_is_set:
                piece, clock_is_set = set_back(piece, shift_ns)
            return piece

        stream = b"".join(small_stream(self._snapshot, blocks, edit=edit))
        if not clock_is_set:
            raise DataError("the RTC's state is not in one piece of the stream")
        return stream

    def _by_stream(self, number: int, on_progress: Progress | None) -> Started:
        plan, emulator = self._set.plans[number], self._set.start(number)
        start = Start(emulator)
        try:
            start.connect()
            self._inspect(start)
            touched = touched_pages(emulator.pid, start.qmp) if plan.vmm != "board" else {}
            feed(self._snapshot, emulator, on_progress, touched, shift_ns=plan.clock_shift_ns)
            start.wait_loaded()
            return start.result()
        finally:
            start.close()

    def _inspect(self, start: Start) -> None:
        self._set.note_ports(start)
        refuse_to_sleep_forever(
            lambda: self._snapshot.skeleton().devices, self._set.plans[0], start.qmp
        )

    def _fill(
        self, filling: Filling, record_path: Path, wait: bool, on_progress: Progress | None
    ) -> float | None:
        """Return when all of RAM was there; None if another process fills from now on."""
        if not wait:
            try:
                hand_over(filling, record_path)
                return None
            except HostError:
                pass  # then this process fills
        total = self._snapshot.manifest.stream_bytes
        while not filling.wait(_POLL_S):
            seen = filling.progress()
            if on_progress is not None and seen.frames:
                on_progress(total * seen.done // seen.frames, total)
        if on_progress is not None:
            on_progress(total, total)
        return self._set.since_begin_ms()


def refuse_to_sleep_forever(
    sections_of: Callable[[], Sequence[DeviceSection]], plan: RestorePlan, qmp: QmpClient
) -> None:
    """Refuse a suspended guest on a QEMU before 9.0: its migration has no suspended guests, and it
    would never wake one that it loads.

    Raises:
        RefusedError: QEMU is that old, and the guest was suspended.
    """
    if plan.vmm != "qemu" or qmp.version >= (9,):
        return
    sections = sections_of()
    if find_section(sections, GLOBAL_STATE_IDSTR) and run_state(sections) == "suspended":
        raise RefusedError(
            "the guest was suspended at the snapshot's instant",
            why=f"{plan.program} (before 9.0) could never wake it",
            remedy="wake it first and take another snapshot, or name a newer QEMU (--program)",
            guest_state="none",
        )
