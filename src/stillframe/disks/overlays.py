"""Overlays: the disk of the instant is frozen, and the VM continues in a new image above it.

The overlay's node is added before the stop, with ``backing: null``, since the transaction sets its
backing (QEMU ``qapi/block-core.json``: blockdev-snapshot). QEMU gets it by path, beside the image,
because the VM keeps it after we exit.
"""

from __future__ import annotations

import contextlib
import os
from collections.abc import Sequence
from pathlib import Path

import msgspec

from stillframe.disks import folding
from stillframe.disks.drives import Drive, own_name
from stillframe.disks.images import frozen_file, qemu_img, shown_path
from stillframe.disks.pins import pin
from stillframe.disks.targets import reserve_room
from stillframe.errors import (
    HostError,
    MachineError,
    RefusedError,
    SinkError,
    StillframeError,
    UsageError,
)
from stillframe.machine.process.resume import start_time
from stillframe.machine.process.vm_info import reachable_path
from stillframe.model import CapturedDisk, FrozenFile
from stillframe.qmp.client import QmpClient
from stillframe.qmp.command import Command, QmpCommandError


class FoldWill(msgspec.Struct, frozen=True, kw_only=True):
    """How the guard folds one overlay back after we died.

    ``finish``: ends a fold that is under way. ``begin``: starts one, only while the overlay,
    ``path``, is in use: an unused one lacks later writes. ``remove``: deletes its node; the file
    goes once QEMU has closed it.
    """

    path: str
    finish: tuple[Command, ...]
    begin: Command
    remove: Command


class DiskOverlays:
    """The overlays of one snapshot. Call :meth:`undo` unless the snapshot came to be.

    Args:
        directory: where they go; None puts each beside its image.
        otherwise: where a block device's overlay goes if ``directory`` is None.
        token: makes the names unique to this take.
    """

    def __init__(
        self,
        qmp: QmpClient,
        pid: int,
        drives: Sequence[Drive],
        directory: str | None,
        otherwise: str | None,
        token: str,
    ) -> None:
        self._qmp = qmp
        self._pid = pid
        self._start_time = start_time(pid)
        self._drives = tuple(drives)
        self._nodes: list[str] = []
        self._paths: list[str] = []
        self._started = False
        try:
            for number, drive in enumerate(drives):
                place = directory or (None if drive.protocol == "file" else otherwise)
                self._prepare(drive, place, token, number)
        except BaseException:
            self.undo()
            raise

    def _prepare(self, drive: Drive, directory: str | None, token: str, number: int) -> None:
        if directory is None and drive.protocol != "file":
            raise UsageError(
                f"nowhere to put an overlay over {drive.filename}, which is no file",
                remedy="keep the snapshot in a file: it goes beside that",
            )
        image = Path(drive.file or drive.filename)
        place = Path(directory).absolute() if directory is not None else image.parent
        name = f"{folding.MARK}{token}-{number}{folding.SUFFIX}"
        path = str(place / f"{image.name.partition(folding.MARK)[0]}{name}")
        failure = f"cannot make an overlay over {drive.filename}"
        # -u: do not open the image, which its lock would forbid.
        below = ["-b", str(image), "-F", drive.driver]
        self._paths.append(path)
        qemu_img(
            ["create", "-q", "-u", "-f", "qcow2", *below, path, str(drive.virtual_size_bytes)],
            failure,
        )
        try:
            Path(path).chmod(0o600)
            owner = Path(f"/proc/{self._pid}").stat()
            if owner.st_uid != os.geteuid():
                os.chown(path, owner.st_uid, owner.st_gid)
        except OSError as error:
            raise HostError(failure, why=error.strerror, guest_state="running") from error
        node = own_name(token, number)
        self._qmp.execute(
            "blockdev-add",
            {
                "driver": "qcow2",
                "node-name": node,
                "file": {"driver": "file", "filename": path},
                "backing": None,
                "discard": "unmap",
                "cache": {"direct": drive.direct, "no-flush": drive.no_flush},
            },
        )
        self._nodes.append(node)

    def reserve(self, length_bytes: int) -> None:
        """Reserve that much room in each overlay for the guest.

        Raises:
            SinkError: there is not enough.
        """
        for path in self._paths:
            fd = os.open(path, os.O_RDWR | os.O_CLOEXEC)
            try:
                if code := reserve_room(fd, length_bytes):
                    raise SinkError(f"no room for {path}", why=os.strerror(code))
            finally:
                os.close(fd)

    @property
    def planned(self) -> tuple[CapturedDisk, ...]:
        """The disks that will be frozen; see :func:`to_be_frozen`."""
        return to_be_frozen(self._pid, self._drives)

    @property
    def paths(self) -> tuple[str, ...]:
        """The overlays' files."""
        return tuple(self._paths)

    def actions(self) -> list[dict[str, object]]:
        """Return the transaction's actions that freeze the disks."""
        return [
            {
                "type": "blockdev-snapshot",
                "data": {"node": drive.format_node, "overlay": node},
            }
            for drive, node in zip(self._drives, self._nodes, strict=True)
        ]

    def wills(self) -> list[FoldWill]:
        """Return how to go back to the images."""
        found = []
        for drive, node, path in zip(self._drives, self._nodes, self._paths, strict=True):
            job = {"id": folding.fold_job(path)}
            top = {"device": node}
            if drive.node != drive.format_node:  # below a filter
                top = {"device": drive.node, "top-node": node}
            commit = {"job-id": job["id"], **top, "base-node": drive.format_node}
            found.append(
                FoldWill(
                    path=path,
                    finish=(("job-complete", job), ("job-dismiss", job)),
                    begin=("block-commit", {**commit, "auto-dismiss": False}),
                    remove=("blockdev-del", {"node-name": node}),
                )
            )
        return found

    def started(self) -> None:
        """Note that the transaction is sent next: from now on the VM may be on the overlays."""
        self._started = True

    def records(self, snapshot_directory: str | None) -> tuple[CapturedDisk, ...]:
        """Return the frozen disks.

        Raises:
            SinkError: an image cannot be read.
        """
        found = []
        for disk, path in zip(self.planned, self._paths, strict=True):
            files = []
            for file in disk.files:
                try:
                    shown = shown_path(file.path, snapshot_directory)
                    files.append(frozen_file(file.path, file.format, shown_as=shown))
                except OSError as error:
                    raise SinkError(
                        f"cannot read the frozen image {file.path}",
                        why=error.strerror,
                        guest_state="running",
                    ) from error
            found.append(msgspec.structs.replace(disk, files=tuple(files), overlay=path))
        return tuple(found)

    def pin(self, snapshot: str, *, pending: bool) -> None:
        """Record that this snapshot needs the frozen images.

        Raises:
            SinkError: a pin cannot be written.
        """
        for path in self._paths:
            pin(path, snapshot, pending=pending)

    def fold_back(self) -> None:
        """Go back to the disks as they were: fold the guest's writes since then into them, while it
        runs or after its VM has ended.

        Raises:
            RefusedError, BusyError, MachineError: as ``folding.fold``.
            HostError: the VM has ended, and the overlay cannot be folded into its image.
        """
        try:
            for one in folding.fold(self._qmp, self._pid, only=self._paths):
                if set(one.kept) & set(self._paths):
                    raise RefusedError(
                        f"disk {one.disk} is still on its overlay",
                        why=f"{', '.join(one.needed_by)} has the image below open",
                        remedy="end that, then run 'stillframe commit'",
                        guest_state="running",
                    )
        except MachineError:
            if self._qmp.alive or not folding.has_ended(self._pid, self._start_time):
                raise
            for path in self._paths:
                folding.fold_of_ended(path)
        self._started = False

    def undo(self) -> None:
        """Fold back as :meth:`fold_back`, and remove the overlays.

        Never raises; the next take, or ``commit``, folds what could not be folded now.
        """
        with contextlib.suppress(StillframeError):
            if self._started:
                self.fold_back()
            for node in self._nodes:
                with contextlib.suppress(QmpCommandError):
                    self._qmp.execute("blockdev-del", {"node-name": node})
        with contextlib.suppress(MachineError):
            in_use = folding.files_in_use(self._qmp)
            for path in self._paths:
                if path not in in_use:
                    folding.remove_overlay(path)


def to_be_frozen(pid: int, drives: Sequence[Drive]) -> tuple[CapturedDisk, ...]:
    """Return the disks as they will be recorded once frozen, with only the names of their files,
    because the VM still writes to them."""
    process = Path(f"/proc/{pid}")
    return tuple(
        CapturedDisk(
            device=drive.device,
            qdev=drive.qdev,
            node_name=drive.format_node,
            kind="overlay",
            virtual_size_bytes=drive.virtual_size_bytes,
            files=tuple(
                FrozenFile(
                    path=reachable_path(process, name) or name,
                    format=image_format,
                    size_bytes=0,
                    mtime_ns=0,
                    head="",
                )
                for image_format, name in drive.layers
            ),
        )
        for drive in drives
    )
