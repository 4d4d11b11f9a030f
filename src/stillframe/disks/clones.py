"""Copies that share their blocks with the image (XFS, btrfs): made in milliseconds, without room.

A clone made in the stop would take longer the more extents the image has. So in the stop the VM
only moves to an overlay. Once the guest runs, the frozen image and those below it are cloned, and
the overlay is folded back. Sources: ioctl_ficlonerange(2); Linux ``fs/xfs/xfs_reflink.c``.
"""

from __future__ import annotations

import contextlib
import fcntl
import os
import stat
import struct
import threading
from collections.abc import Sequence
from itertools import pairwise
from pathlib import Path

import msgspec

from stillframe.disks.copied import Step, copied_disk, name_copy
from stillframe.disks.drives import Drive
from stillframe.disks.images import qemu_img
from stillframe.disks.overlays import DiskOverlays, FoldWill
from stillframe.disks.targets import Target, TargetDirectory
from stillframe.disks.users import users_of
from stillframe.errors import HostError, SinkError, StillframeError
from stillframe.machine.process.inspection import ask
from stillframe.machine.process.vm_info import reachable_path, same_files
from stillframe.model import CapturedDisk, FrozenFile
from stillframe.qmp.client import QmpClient
from stillframe.qmp.replies import as_list

_FICLONERANGE = 0x4020940D
_PIECE_BYTES = 256 << 20
"""Cloned in one call. Meanwhile the image is locked against writes, before Linux 6.7 also against
reads."""
_ROOM_BYTES = 64 << 20
"""Room for the guest's writes while it is on the overlay."""
_WAIT_S = 0.05
_FORMATS = ("raw", "qcow2")


class _Told(msgspec.Struct, rename="kebab"):
    virtual_size: int
    full_backing_filename: str = ""
    encrypted: bool = False
    format_specific: dict[str, object] = {}


class _Layer:
    """One image of a disk, and its clone."""

    def __init__(self, directory: TargetDirectory, label: str, path: str, kind: str) -> None:
        self.format = kind
        self.target = Target(directory, label, suffix=kind)
        try:
            self._fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
        except OSError:
            self.target.close(keep=False)
            raise

    def clone(self, stop: threading.Event) -> None:
        """Clone the image and close it: a fold refuses an image that any process has open.

        Returns early if ``stop`` is set.

        Raises:
            OSError: cloning fails.
        """
        length_bytes, at = os.fstat(self._fd).st_size, 0
        while at < length_bytes and not stop.is_set():
            # 0 means to the end, which need not be the end of a block.
            piece = _PIECE_BYTES if at + _PIECE_BYTES < length_bytes else 0
            _clone_range(self._fd, self.target.fd, at, piece)
            at += _PIECE_BYTES
        self._let_go()

    def _let_go(self) -> None:
        if self._fd >= 0:
            os.close(self._fd)
            self._fd = -1

    def rest_on(self, below: _Layer) -> None:
        """Make ``below`` the backing file, instead of the image it was cloned from; both are in one
        directory.

        Raises:
            HostError: qemu-img fails.
        """
        name = f"/proc/self/fd/{self.target.fd}"
        words = ["rebase", "-u", "-f", self.format, "-F", below.format]
        words += ["-b", below.target.path.name, name]
        qemu_img(words, f"cannot finish {self.target.path}", pass_fds=[self.target.fd])

    def close(self, *, keep: bool) -> None:
        self._let_go()
        self.target.close(keep=keep)


class DiskClones:
    """The clones of one snapshot. Call :meth:`close` on every path.

    Args:
        drives: some of those that :func:`clonable` returned.
        token: makes the names unique to this take.

    Raises:
        SinkError, HostError, MachineError: the overlays or the files cannot be made.
    """

    def __init__(
        self,
        qmp: QmpClient,
        pid: int,
        drives: Sequence[Drive],
        directory: TargetDirectory,
        token: str,
    ) -> None:
        self._drives = tuple(drives)
        self.directory = directory
        self._layers: list[list[_Layer]] = []
        self._give_up = threading.Event()
        self._failure: Exception | None = None
        self._worker: threading.Thread | None = None
        self._overlays = DiskOverlays(qmp, pid, drives, None, None, token)
        try:
            self._overlays.reserve(_ROOM_BYTES)
            for drive in drives:
                self._layers.append([])
                for path, kind in _files(pid, drive):
                    self._layers[-1].append(_Layer(directory, drive.label, path, kind))
        except BaseException as error:
            self.close(keep=False)
            if isinstance(error, OSError):
                raise HostError("the VM's disks cannot be cloned", why=error.strerror) from error
            raise

    @property
    def overlays(self) -> tuple[str, ...]:
        """The overlays that the VM is on for a moment."""
        return self._overlays.paths

    @property
    def paths(self) -> frozenset[Path]:
        """The clones' files."""
        return frozenset(layer.target.path for layers in self._layers for layer in layers)

    def actions(self) -> list[dict[str, object]]:
        """Return the transaction's actions that freeze the disks."""
        return self._overlays.actions()

    def wills(self) -> list[FoldWill]:
        """Return how to go back to the images if we die."""
        return self._overlays.wills()

    def started(self) -> None:
        """Note that the transaction is sent next."""
        self._overlays.started()

    def go(self) -> None:
        """Start to clone and then to fold back, now that the guest runs."""
        self._worker = threading.Thread(target=self._work, name="disk clones")
        self._worker.start()

    def _work(self) -> None:
        try:
            for drive, layers in zip(self._drives, self._layers, strict=True):
                for layer in layers:
                    try:
                        layer.clone(self._give_up)
                    except OSError as error:
                        raise SinkError(
                            f"the image of disk {drive.label} could not be cloned",
                            why=error.strerror,
                            remedy="look at the file system of the disk and of the copies",
                            guest_state="running",
                        ) from error
        except SinkError as error:
            self._failure = error
            self._close_layers(keep=False)  # the image shares no blocks when the fold writes to it
        try:
            self._overlays.fold_back()
        except StillframeError as error:
            self._failure = self._failure or error

    def finish(self, step: Step) -> None:
        """Wait until the VM is on its images again, and make the clones durable.

        Raises:
            SinkError: an image could not be cloned. StillframeError: the VM is still on an overlay.
        """
        while self._worker is not None:
            self._worker.join(_WAIT_S)
            if not self._worker.is_alive():
                self._worker = None
            step(0, 0)
        if self._failure is not None:
            raise self._failure
        for layers in self._layers:
            for upper, lower in pairwise(layers):
                upper.rest_on(lower)
            for layer in layers:
                layer.target.seal()

    def records(self, snapshot_directory: str | None, step: Step) -> tuple[CapturedDisk, ...]:
        """Name the clones and describe them.

        Raises:
            SinkError: they cannot be named or read.
        """
        found = []
        for drive, layers in zip(self._drives, self._layers, strict=True):
            files: list[FrozenFile] = []
            for layer in reversed(layers):  # name each layer after the one below it
                files.insert(0, name_copy(layer.target, layer.format, snapshot_directory, step))
            found.append(copied_disk(drive, files))
        return tuple(found)

    def close(self, *, keep: bool) -> None:
        """Take back everything that was set up; never raises. The guest keeps running.

        Args:
            keep: the files belong to a finished snapshot.
        """
        self._give_up.set()
        if self._worker is not None:
            self._worker.join()
            self._worker = None
        self._overlays.undo()
        self._close_layers(keep=keep)
        self.directory.remove_if_empty()

    def _close_layers(self, *, keep: bool) -> None:
        for layers in self._layers:
            for layer in layers:
                layer.close(keep=keep)


def clonable(
    qmp: QmpClient, pid: int, drives: Sequence[Drive], directory: TargetDirectory
) -> list[Drive]:
    """Return the drives whose images can be cloned into a directory, if it has room for full copies
    of them: whatever the guest overwrites later takes extra room.

    Raises:
        MachineError: the monitor went away.
    """
    try:
        if not same_files(Path(f"/proc/{pid}")) or as_list(ask(qmp, "query-block-jobs")):
            return []
        found = [drive for drive in drives if _can_be_cloned(pid, drive, directory.place)]
        needed = sum(_allocated_bytes(drive) + _ROOM_BYTES for drive in found)
        status = os.statvfs(directory.place)
        return found if status.f_bavail * status.f_frsize > needed else []
    except (OSError, HostError, msgspec.MsgspecError):
        return []


def _can_be_cloned(pid: int, drive: Drive, place: Path) -> bool:
    if drive.is_flash or drive.encrypted or drive.temporary or not drive.plain:
        return False
    if drive.protocol != "file" or drive.file is None or drive.driver not in _FORMATS:
        return False
    files = _files(pid, drive)
    for number, (path, kind) in enumerate(files):
        told = _told(path, kind) if kind in _FORMATS else None
        if told is None or told.encrypted or "data-file" in str(told.format_specific):
            return False
        if number == 0 and told.virtual_size != drive.virtual_size_bytes:
            return False  # a part of the file
        below = files[number + 1][0] if number + 1 < len(files) else ""
        if os.path.realpath(told.full_backing_filename or "/") != os.path.realpath(below or "/"):
            return False
        if users_of(path, besides=pid) or not _shares_blocks(path, place):
            return False
    return True


def _files(pid: int, drive: Drive) -> list[tuple[str, str]]:
    """Return a disk's images from the top down, as paths that we can open, with their formats."""
    process = Path(f"/proc/{pid}")
    return [(reachable_path(process, name) or name, kind) for kind, name in drive.layers]


def _told(path: str, kind: str) -> _Told:
    words = ["info", "-U", "--output=json", "-f", kind, path]
    return msgspec.json.decode(qemu_img(words, f"cannot read {path}"), type=_Told)


def _allocated_bytes(drive: Drive) -> int:
    return Path(drive.file or drive.filename).stat().st_blocks * 512


def _shares_blocks(path: str, place: Path) -> bool:
    """Return whether a file can share blocks with one in a directory, by trying it with its first
    block."""
    with contextlib.ExitStack() as stack:
        try:
            source = os.open(path, os.O_RDONLY | os.O_CLOEXEC | os.O_NONBLOCK)
            stack.callback(os.close, source)
            status = os.fstat(source)
            if not stat.S_ISREG(status.st_mode):
                return False
            scratch = os.open(place, os.O_RDWR | os.O_TMPFILE | os.O_CLOEXEC, 0o600)
            stack.callback(os.close, scratch)
            block_bytes = os.fstatvfs(source).f_bsize
            _clone_range(source, scratch, 0, block_bytes if status.st_size > block_bytes else 0)
        except OSError:
            return False
    return True


def _clone_range(source: int, target: int, at: int, length_bytes: int) -> None:
    fcntl.ioctl(target, _FICLONERANGE, struct.pack("=qQQQ", source, at, length_bytes, at))
