"""Copies of disks as they are at the instant: ``blockdev-backup`` into files of ours.

A backup starts in the stop. It first copies whatever the guest is about to overwrite, and the rest
in the background. A failing target must not fail the guest's writes. From QEMU 11.1 on, QEMU then
breaks the copy (``on-cbw-error``). Before, the target stands beside a ``null-co`` under a
``quorum`` that needs only one of them: a write that fails in the target succeeds for the guest, and
QEMU reports it as an event. Sources: QEMU ``qapi/block-core.json`` (BackupCommon,
BlockdevOptionsQuorum), ``block/quorum.c``, ``block/copy-before-write.c``.
"""

from __future__ import annotations

import contextlib
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

from stillframe.disks.copied import Step, copied_disk, name_copy
from stillframe.disks.drives import OURS, Drive, own_name
from stillframe.disks.images import local_size_bytes, measured_bytes
from stillframe.disks.targets import Target, TargetDirectory
from stillframe.errors import MachineError, SinkError, SnapshotFailed, StillframeError
from stillframe.model import CapturedDisk
from stillframe.qmp.client import AddedFd, QmpClient
from stillframe.qmp.command import QmpCommandError
from stillframe.qmp.events import QmpEvent
from stillframe.qmp.replies import as_int, as_list, as_map

_MARGIN_BYTES = 64 << 20
"""Room for the guest's writes between the measurement and the instant."""
_AT_FIRST_BYTES_PER_S = 1
_FULL_SPEED = 0
_PIECE_BYTES = 256 << 10
_POLL_S = 0.05
_GONE_S = 10.0
_STILL_S = 60.0
"""After this long without a byte, the copies' storage counts as hung."""
_LATE_EVENT_S = 0.1
_END_S = 10.0
"""How long after a job its end event may come."""
_ENDS = frozenset({"BLOCK_JOB_COMPLETED", "BLOCK_JOB_CANCELLED"})
_BROKEN = frozenset({"QUORUM_REPORT_BAD", "QUORUM_FAILURE"})
_GUESTS_OWN = "BLOCK_IO_ERROR"
"""An error that the guest met; it may be a copy's if QEMU supports neither protection."""


class _Copy:
    """The copy of one disk."""

    def __init__(self, drive: Drive, name: str, target: Target) -> None:
        self.drive = drive
        self.job = name
        self.nodes: list[str] = []
        self.target = target
        self.added: AddedFd | None = None
        # LUKS: copy the ciphertext, from below the format.
        self.source = drive.file_node if drive.luks else drive.node
        self.format = "luks" if drive.luks else "qcow2"

    def prepare(self, qmp: QmpClient, *, breaks_snapshot: bool) -> None:
        drive = self.drive
        if drive.luks:
            length_bytes = local_size_bytes(drive.file) if drive.file else 0
            self.target.reserve(length_bytes, drive.label)
            self.target.set_length(length_bytes)
        else:
            length_bytes = drive.virtual_size_bytes
            self.target.format_qcow2(length_bytes)
            self.target.reserve(self.wanted_bytes(), drive.label)
        self.added = qmp.add_fd(self.target.fd)
        # No flushes: saving the device state flushes every node, and the guest would wait. seal()
        # syncs.
        cache = {"direct": False, "no-flush": True}
        file = {"driver": "file", "filename": self.added.path, "cache": cache}
        driver = "raw" if drive.luks else "qcow2"
        self._add(qmp, {"driver": driver, "file": file, "cache": cache}, "t")
        if not breaks_snapshot:
            self._add_sink(qmp, length_bytes)
            children = list(self.nodes)
            with contextlib.suppress(QmpCommandError):  # a QEMU without quorum
                self._add(qmp, {"driver": "quorum", "vote-threshold": 1, "children": children}, "q")

    def _add_sink(self, qmp: QmpClient, length_bytes: int) -> None:
        """Add a sink that takes every write. QEMU writes zeroes to it from a buffer that it
        allocates each time, in its main loop: small pieces keep the stop short, and copy an empty
        disk eight times as fast."""
        sink = {"driver": "null-co", "size": length_bytes, "read-zeroes": True}
        pieces = {"driver": "blkdebug", "image": sink, "max-transfer": _PIECE_BYTES}
        try:
            self._add(qmp, pieces, "n")
        except QmpCommandError:  # a QEMU without blkdebug
            self._add(qmp, sink, "n")

    def _add(self, qmp: QmpClient, options: Mapping[str, object], kind: str) -> None:
        node = f"{self.job}{kind}"
        qmp.execute("blockdev-add", {**options, "node-name": node})
        self.nodes.append(node)

    @property
    def all_nodes(self) -> tuple[str, ...]:
        """All nodes that the copy may have, each before the one it stands on."""
        return tuple(f"{self.job}{kind}" for kind in "qnt")

    def has(self, name: str) -> bool:
        """Return whether a job or node of that name belongs to this copy."""
        return name == self.job or name in self.all_nodes

    @property
    def top(self) -> str:
        """The node that the job writes to."""
        ends = [node for node in self.nodes if not node.endswith("n")]
        return ends[-1]

    def wanted_bytes(self) -> int:
        drive = self.drive
        # If we cannot read the top image, the estimate is a full disk.
        most = measured_bytes(None, "", drive.virtual_size_bytes)
        now = measured_bytes(drive.file, drive.driver, drive.virtual_size_bytes)
        return min(most, now + _MARGIN_BYTES)

    def action(self, *, breaks_snapshot: bool) -> dict[str, object]:
        data: dict[str, object] = {
            "job-id": self.job,
            "device": self.source,
            "target": self.top,
            "sync": "full",
            "speed": _AT_FIRST_BYTES_PER_S,
        }
        if breaks_snapshot:
            data["on-cbw-error"] = "break-snapshot"
        return {"type": "blockdev-backup", "data": data}


class DiskCopies:
    """The copies of one snapshot. The constructor fixes the names, for :meth:`will`; then
    :meth:`prepare` makes the targets. Call :meth:`close` on every path.

    Args:
        token: makes the names unique to this take.
    """

    def __init__(
        self, qmp: QmpClient, drives: Sequence[Drive], directory: TargetDirectory, token: str
    ) -> None:
        self._qmp = qmp
        self.directory = directory
        self._breaks_snapshot = _takes_break_snapshot(qmp)
        self._copies: list[_Copy] = []
        self._started = False
        self._broken: QmpEvent | None = None
        self._ends: dict[str, QmpEvent] = {}
        self._news = threading.Event()
        self._ended = threading.Event()
        self._watcher: threading.Thread | None = None
        self._unsubscribe: Callable[[], None] | None = None
        self._cancelled = False
        self._cancel_lock = threading.Lock()
        try:
            for number, drive in enumerate(drives):
                target = Target(directory, drive.label)
                self._copies.append(_Copy(drive, own_name(token, number), target))
        except BaseException:
            self.close(keep=False)
            raise

    def prepare(self) -> None:
        """Make the targets. The guest is not touched.

        Raises:
            SinkError: no room. HostError, MachineError: they cannot be made.
        """
        for copy in self._copies:
            copy.prepare(self._qmp, breaks_snapshot=self._breaks_snapshot)

    @property
    def _unshielded(self) -> bool:
        return not self._breaks_snapshot and any(copy.top[-1] != "q" for copy in self._copies)

    @property
    def paths(self) -> frozenset[Path]:
        """The copies' files."""
        return frozenset(copy.target.path for copy in self._copies)

    @property
    def wanted_bytes(self) -> int:
        """The most that the copies may take."""
        return sum(copy.target.reserved_bytes for copy in self._copies)

    def actions(self) -> list[dict[str, object]]:
        """Return the transaction's actions that start the copies."""
        return [copy.action(breaks_snapshot=self._breaks_snapshot) for copy in self._copies]

    def will(self) -> list[tuple[str, dict[str, object]]]:
        """Return the commands that undo everything if we die, in order; they also name what does
        not exist yet."""
        commands: list[tuple[str, dict[str, object]]] = [
            ("block-job-cancel", {"device": copy.job, "force": True}) for copy in self._copies
        ]
        commands += [
            ("blockdev-del", {"node-name": node})
            for copy in self._copies
            for node in copy.all_nodes
        ]
        return commands

    def started(self) -> None:
        """Note that the transaction is sent next: from now on jobs may exist, and may fail."""
        self._started = True
        # Not later: QEMU reports a target's first error at once, the next ones a second later
        # (monitor/monitor.c: rate limits), when the job may have ended.
        self._unsubscribe = self._qmp.subscribe(self._note)

    def go(self) -> None:
        """Copy at full speed and watch for errors, now that the guest runs again.

        Raises:
            SinkError: no room for what the guest wrote before the instant. MachineError: lost.
        """
        self._watcher = threading.Thread(target=self._watch, name="disk copies", daemon=True)
        self._watcher.start()
        for copy in self._copies:
            if not copy.drive.luks:
                copy.target.reserve(copy.wanted_bytes(), copy.drive.label)
            with contextlib.suppress(QmpCommandError):  # a small one may be complete
                speed = {"device": copy.job, "speed": _FULL_SPEED}
                self._qmp.execute("block-job-set-speed", speed)

    def _note(self, event: QmpEvent) -> None:
        if event.name in _ENDS:
            self._ends[str(event.data.get("device"))] = event
        names = (event.data.get(key) for key in ("node-name", "reference"))
        ours = event.name in _BROKEN and any(str(name).startswith(OURS) for name in names)
        if (ours or (self._unshielded and event.name == _GUESTS_OWN)) and self._broken is None:
            self._broken = event
            self._news.set()

    def _watch(self) -> None:
        """Give up the copies as soon as one fails, so that the guest does not wait for it."""
        self._news.wait()
        if self._broken is not None and not self._ended.is_set():
            with contextlib.suppress(StillframeError):
                self._cancel()
                status = as_map(self._qmp.execute("query-status")).get("status")
                if status == "io-error":
                    # The guest stopped at a write that could not be copied; QEMU retries that
                    # write.
                    self._qmp.execute("cont")

    def finish(self, step: Step) -> None:
        """Wait until all copies are complete, make them durable and remove their nodes from QEMU.

        Raises:
            SinkError: a copy could not be written. SnapshotFailed: a disk could not be read, or
                another client ended the job. MachineError: the monitor went away.
        """
        waiting = {copy.job: copy for copy in self._copies}
        moved_s, before = time.monotonic(), -1
        while waiting:
            listed = map(as_map, as_list(self._qmp.execute("query-jobs")))
            jobs = {str(job.get("id")): job for job in listed}
            done = total = 0
            for name, copy in list(waiting.items()):
                job = jobs.get(name, {})
                done += as_int(job.get("current-progress"))
                total += as_int(job.get("total-progress"))
                if self._broken is not None:
                    raise self._failure(self._broken)
                if not job:
                    self._check_end(copy)
                    del waiting[name]
            step(done, total)
            if done != before:
                moved_s, before = time.monotonic(), done
            elif time.monotonic() - moved_s > _STILL_S:
                raise self._stands_still(next(iter(waiting.values())))
            if waiting:
                self._news.wait(_POLL_S)
        # Through libvirt, an event may arrive some milliseconds after the reply that it preceded.
        if self._news.wait(_LATE_EVENT_S) and self._broken is not None:
            raise self._failure(self._broken)
        self._stop_watching()
        self._let_go()
        for copy in self._copies:
            copy.target.seal()

    def _stands_still(self, copy: _Copy) -> SinkError:
        """Return the error for hung storage: QEMU cannot cancel what it has given to the kernel."""
        return SinkError(
            f"the copy of disk {copy.drive.label} stands still",
            why=f"nothing was written to {self.directory.path} for {_STILL_S:g} s",
            remedy="look at its storage; the guest runs, but waits where it writes to what was not"
            " copied yet, until that answers",
            guest_state="running",
        )

    def _check_end(self, copy: _Copy) -> None:
        """Check how a job ended; it vanishes then (an option to keep it would cost time in the
        stop)."""
        deadline_s = time.monotonic() + _END_S
        while (end := self._ends.get(copy.job)) is None and time.monotonic() < deadline_s:
            time.sleep(_POLL_S / 5)  # through libvirt the event comes a little later
        if end is None:
            why = "nobody told how its job ended"
        elif end.data.get("error"):
            why = str(end.data["error"])
        elif end.name != "BLOCK_JOB_COMPLETED" or end.data.get("offset") != end.data.get("len"):
            why = "its job was cancelled by somebody else"
        else:
            return
        raise SnapshotFailed(
            f"the copy of disk {copy.drive.label} failed",
            why=why,
            remedy="look at the disk and at the copy's file system, then take another",
            guest_state="running",
        )

    def _failure(self, event: QmpEvent) -> StillframeError:
        data = event.data
        if event.name in _BROKEN:
            name = str(data.get("node-name") or data.get("reference"))
            labels = [copy.drive.label for copy in self._copies if copy.has(name)]
            label = labels[0] if labels else name
            return SinkError(
                f"the copy of disk {label} could not be written",
                why=str(data.get("error") or data.get("reason") or event.name),
                remedy="look at the file system of the copies; the guest was not told",
                guest_state="running",
            )
        device = data.get("device") or data.get("node-name")
        return SnapshotFailed(
            f"disk {device} had an error while it was copied",
            why=str(data.get("reason") or f"{data.get('operation')} failed"),
            remedy="look at the disk's storage and at the file system of the copies",
            guest_state="running",
        )

    def records(self, snapshot_directory: str | None, step: Step) -> tuple[CapturedDisk, ...]:
        """Name the complete copies and describe them.

        Raises:
            SinkError: they cannot be named or read.
        """
        return tuple(
            copied_disk(copy.drive, [name_copy(copy.target, copy.format, snapshot_directory, step)])
            for copy in self._copies
        )

    def _cancel(self) -> None:
        with self._cancel_lock:
            if self._cancelled:
                return
            self._cancelled = True
            for copy in self._copies:
                with contextlib.suppress(QmpCommandError):
                    self._qmp.execute("block-job-cancel", {"device": copy.job, "force": True})
            deadline_s = time.monotonic() + _GONE_S
            while time.monotonic() < deadline_s and self._any_running():
                time.sleep(_POLL_S / 5)

    def _any_running(self) -> bool:
        names = {copy.job for copy in self._copies}
        jobs = map(as_map, as_list(self._qmp.execute("query-jobs")))
        return any(job.get("id") in names for job in jobs)

    def _stop_watching(self) -> None:
        self._ended.set()
        self._news.set()
        if self._unsubscribe is not None:
            self._unsubscribe()
            self._unsubscribe = None
        if self._watcher is not None:
            self._watcher.join(_GONE_S)
            self._watcher = None

    def _let_go(self) -> None:
        for copy in self._copies:
            while copy.nodes:
                with contextlib.suppress(QmpCommandError):
                    self._qmp.execute("blockdev-del", {"node-name": copy.nodes[-1]})
                copy.nodes.pop()
            if copy.added is not None:
                with contextlib.suppress(QmpCommandError):
                    self._qmp.remove_fd(copy.added)
                copy.added = None

    def close(self, *, keep: bool) -> None:
        """Take back everything that was set up; never raises. The guest keeps running.

        Args:
            keep: the files belong to a finished snapshot.
        """
        with contextlib.suppress(MachineError):
            if self._started and not keep:
                self._cancel()
            self._stop_watching()
            self._let_go()
        for copy in self._copies:
            copy.target.close(keep=keep)
        self.directory.remove_if_empty()


def _takes_break_snapshot(qmp: QmpClient) -> bool:
    """Return whether ``blockdev-backup`` has ``on-cbw-error`` (QEMU 11.1)."""
    schema = [as_map(entry) for entry in as_list(qmp.execute("query-qmp-schema"))]
    by_name = {str(entry.get("name")): entry for entry in schema}
    arguments = by_name.get(str(by_name.get("blockdev-backup", {}).get("arg-type")), {})
    members = map(as_map, as_list(arguments.get("members")))
    return any(member.get("name") == "on-cbw-error" for member in members)
