"""The filling of an image, by whichever process: this one, a separate one, an heir."""

from __future__ import annotations

import contextlib
import os
import threading
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Self

from stillframe.errors import DataError, HostError, MachineError, NotFoundError
from stillframe.image.clone import Clone, is_userfaultfd, watch
from stillframe.image.fill_record import (
    ClonePlace,
    FillRecord,
    lock_record,
    note_complete,
    read_record,
    write_record,
)
from stillframe.image.filler import Filler, Progress
from stillframe.image.hand_over import (
    READY_TIMEOUT_S,
    Handles,
    says_ready,
    start_process,
    write_keys,
)
from stillframe.image.ram_image import PAGE_BYTES, RamImage, is_sealed, memory_file
from stillframe.image.working_set import load_working_set, save_working_set
from stillframe.kernel.remote_attach import fetch_fd
from stillframe.kernel.userfaultfd import Userfaultfd
from stillframe.still.sealing import Unlock
from stillframe.still.snapshot import Snapshot
from stillframe.store import open_snapshot
from stillframe.store.locations import absolute
from stillframe.store.processes import start_ticks


class Filling:
    """The filling of one image by this process, in threads.

    Made by :meth:`make`, followed by ``begin`` and ``sweep``; or by :meth:`adopt`. It ends with
    ``wait`` (the image is complete), ``hand_over``, or ``close``: then the clones wait for an heir.
    """

    def __init__(
        self, snapshot: Snapshot, image: RamImage, path: str, record_path: Path, *, prefetch: bool
    ) -> None:
        """Own ``snapshot`` and ``image`` from here on."""
        self.snapshot = snapshot
        self.image = image
        self._path = path
        self._record_path = record_path
        self._lock_fd = -1
        self._clones: list[Clone] = []
        count = snapshot.index.frame_count
        working_set = load_working_set(path, snapshot.content_id, count) if prefetch else []
        self._filler = Filler(image, working_set=working_set)

    @classmethod
    def make(
        cls,
        path: str | os.PathLike[str],
        numbers: Sequence[int],
        record_path: Path,
        *,
        working_set: bool = True,
        unlock: Unlock | None = None,
        make_file: Callable[[int], int] = memory_file,
        parents: Sequence[str] = (),
        like: Snapshot | None = None,
    ) -> Self:
        """Make an empty image of a snapshot's blocks, before its clones are started.

        Args:
            unlock: gives the key of an encrypted snapshot.
            record_path: where to record how another process can go on.
            working_set: load the recorded working set first.
            make_file: as for ``RamImage.make``.
            parents: files of an increment's parents.
            like: the snapshot, already open.

        Raises:
            NotFoundError, DataError: as ``open_snapshot``.
            RefusedError, HostError: as ``RamImage``.
        """
        path = absolute(path)
        snapshot = open_snapshot(path, unlock, parents=parents, like=like)
        try:
            image = RamImage.make(snapshot, numbers, make_file)
        except BaseException:
            snapshot.close()
            raise
        return cls(snapshot, image, path, record_path, prefetch=working_set)

    @property
    def numbers(self) -> tuple[int, ...]:
        """Numbers of the image's blocks in the snapshot."""
        return self.image.numbers

    @property
    def inherited(self) -> tuple[int, ...]:
        """Descriptors that the VMs inherit."""
        return self.image.inherited

    def prefetch(self) -> None:
        """Start the threads and load the working set ahead of the first fault."""
        self._filler.prefetch()

    def begin(self, vms: Mapping[int, tuple[int, int] | None]) -> None:
        """Watch the started VMs, whose guests have not run and which have loaded nothing, and start
        to fill.

        Args:
            vms: process ids, and their gadgets as for ``clone.watch``.

        Raises:
            RefusedError, HostError, BusyError, MachineError: as ``clone.watch``; nothing is filled.
        """
        clones: list[Clone] = []
        try:
            for pid, gadgets in vms.items():
                clones.append(watch(self.image, pid, gadgets))
            self.image.empty()
            self._lock_fd = write_record(self._record_path, self._make_record(clones))
        except BaseException:
            for clone in clones:
                clone.close()
            raise
        self._clones = clones
        self._filler.start(clones)

    def sweep(self) -> None:
        """Also fill pages that no guest asks for, now that the guests run."""
        self._filler.sweep()

    def check(self) -> None:
        """Raise the error that keeps pages from the clones; see :meth:`wait`."""
        self._filler.check()

    def _make_record(self, clones: Sequence[Clone]) -> FillRecord:
        return FillRecord(
            snapshot=self._path,
            snapshot_id=self.snapshot.id,
            parents=tuple(file.place for file in self.snapshot.files[1:]),
            blocks=self.image.numbers,
            files=self.image.identities,
            data_bytes=sum(
                self.snapshot.index.page_counts(number)[0] * PAGE_BYTES
                for number in self.image.numbers
            ),
            clones=tuple(clone.place for clone in clones),
        )

    @classmethod
    def adopt(cls, record_path: Path, unlock: Unlock | None = None) -> Self:
        """Go on after another filler's death: the clones that still run get their pages.

        Raises:
            NotFoundError: nothing is left to fill there, or the snapshot is gone.
            BusyError: another process is filling. DataError: the snapshot is another or a damaged
                one.
            MachineError: no clone runs any more. HostError: not permitted.
            LockedError: the snapshot is encrypted.
        """
        lock_fd = lock_record(record_path)
        try:
            filling = cls.inherit(record_path, lock_fd, unlock=unlock)
        except BaseException:
            os.close(lock_fd)
            raise
        try:
            filling.go_on()
        except BaseException:
            filling.close()
            raise
        return filling

    @classmethod
    def inherit(
        cls,
        record_path: Path,
        lock_fd: int,
        handles: Handles | None = None,
        unlock: Unlock | None = None,
    ) -> Self:
        """Prepare to go on; ``go_on`` starts it. Raises as :meth:`adopt`; the caller keeps the lock
        if this raises."""
        record = read_record(lock_fd)
        if not record.snapshot:
            raise MachineError(
                "nobody can complete the image",
                why="the VM that was forked has overwritten what the fork did not save",
                remedy="end the clones, and fork again",
                guest_state="unknown",
            )
        snapshot = open_snapshot(record.snapshot, unlock, parents=record.parents)
        image: RamImage | None = None
        clones: list[Clone] = []
        try:
            if snapshot.id != record.snapshot_id:
                raise DataError(f"{record.snapshot} is not the snapshot that VMs run from any more")
            alive = [c for c in record.clones if start_ticks(c.pid) == c.started]
            if not alive:
                record_path.unlink(missing_ok=True)
                raise MachineError("the VMs of the image have ended", guest_state="none")
            files = handles.files if handles else _open_files(alive[0].pid, record.files)
            if any(map(is_sealed, files)):  # the dead filler was done, except for the record
                for fd in files:
                    os.close(fd)
                record_path.unlink(missing_ok=True)
                raise NotFoundError(f"the image at {record_path} is complete")
            image = RamImage(snapshot, record.blocks, files)
            uffds = handles.uffds if handles else {}
            for place in _still_watched(image, alive):
                with contextlib.suppress(ProcessLookupError):
                    clones.append(_take_over(image, place, uffds.get(place.pid)))
            if not clones:
                record_path.unlink(missing_ok=True)
                raise NotFoundError(f"the image at {record_path} is complete")
        except BaseException:
            for clone in clones:
                clone.close()
            if image is not None:
                image.close()
            snapshot.close()
            raise
        filling = cls(snapshot, image, record.snapshot, record_path, prefetch=True)
        filling._lock_fd, filling._clones = lock_fd, clones
        return filling

    def go_on(self) -> None:
        """Start to fill what the other process has not.

        Raises:
            HostError: the kernel does not tell which pages are there.
        """
        self._filler.start(self._clones, taken_over=True)
        self._filler.sweep()

    def progress(self) -> Progress:
        return self._filler.progress()

    def wait(self, timeout_s: float | None = None) -> bool:
        """Wait until the image is complete; then this is closed, and the clones need no filler.

        Returns:
            Whether it is complete; False after ``timeout_s``.

        Raises:
            DataError, MachineError: as ``Filler.wait``.
        """
        if not self._filler.wait(timeout_s):
            return False
        self.image.seal()
        note_complete(self._record_path)
        self._record_path.unlink(missing_ok=True)
        if Path(self._path).parent == self._record_path.parent:  # a fork's own, now useless
            Path(self._path).unlink(missing_ok=True)
        self.close()
        return True

    def hand_over(self, *, log_path: Path | None = None, heir: bool = False) -> int:
        """Let a separate process go on, and close this; return its process id.

        Args:
            log_path: file for that process's messages.
            heir: start a second process that goes on if that one is killed.

        Raises:
            HostError: it does not start; this process goes on filling.
        """
        keys = write_keys(self.snapshot.secrets)
        ready, ready_there = os.pipe()
        go_there, go = os.pipe()
        try:
            handles = Handles(
                lock=self._lock_fd,
                files=self.image.fds,
                uffds={clone.pid: clone.uffd.fileno() for clone in self._clones},
                ready=ready_there,
                go=go_there,
                keys=keys,
                heir=heir,
            )
            process = start_process(self._record_path, handles, log_path)
            os.close(ready_there)
            ready_there = -1
            if not says_ready(ready):
                process.kill()
                process.wait()
                raise HostError(
                    "the process that was to fill the image did not get ready",
                    why=f"it ended, or took more than {READY_TIMEOUT_S:g} s",
                )
            self.close()
            os.write(go, b"1")
            # Reap it, so that it does not stay a zombie while we live.
            threading.Thread(target=process.wait, name="filler's end", daemon=True).start()
            return process.pid
        finally:
            for fd in (ready, ready_there, go_there, go, keys):
                if fd >= 0:
                    os.close(fd)

    def close(self, *, keeps_working_set: bool = True) -> None:
        """Stop filling. The clones of an incomplete image wait for an heir."""
        self._filler.stop()
        asked = self._filler.asked
        if asked and keeps_working_set:
            known = load_working_set(
                self._path, self.snapshot.content_id, self.snapshot.index.frame_count
            )
            save_working_set(self._path, self.snapshot.content_id, [*known, *asked])
        self.image.close()
        self.snapshot.close()
        if self._lock_fd >= 0:
            os.close(self._lock_fd)
            self._lock_fd = -1


def _still_watched(image: RamImage, places: Sequence[ClonePlace]) -> list[ClonePlace]:
    """Return the clones that were not released: the dead filler may have been done, except for the
    record."""
    watched = [place for place in places if is_userfaultfd(place.pid, place.uffd)]
    if len(watched) < len(places):
        image.scan()
        if image.incomplete_frames():
            raise HostError(
                "a VM has lost its userfaultfd, and reads zeroes in place of pages",
                remedy="end the VM",
                guest_state="unknown",
            )
    return watched


def _take_over(image: RamImage, place: ClonePlace, uffd: int | None) -> Clone:
    pidfd = os.pidfd_open(place.pid)
    try:
        if uffd is None:
            uffd = fetch_fd(pidfd, place.uffd)
        return Clone(image, place.pid, pidfd, Userfaultfd(uffd), place.uffd, place.addresses)
    except BaseException:
        os.close(pidfd)
        raise


def _open_files(pid: int, files: Sequence[tuple[int, int]]) -> list[int]:
    """Open the image's files, which each clone holds open."""
    found: dict[tuple[int, int], Path] = {}
    try:
        for entry in Path(f"/proc/{pid}/fd").iterdir():
            with contextlib.suppress(FileNotFoundError):
                status = entry.stat()
                found[status.st_dev, status.st_ino] = entry
        fds: list[int] = []
        try:
            for key in files:
                if key not in found:
                    raise HostError(f"VM {pid} does not hold its image open", guest_state="unknown")
                fds.append(os.open(found[key], os.O_RDWR | os.O_CLOEXEC))
        except BaseException:
            for fd in fds:
                os.close(fd)
            raise
    except OSError as error:
        raise HostError(
            f"the files of VM {pid} cannot be opened", why=error.strerror, guest_state="unknown"
        ) from error
    return fds
