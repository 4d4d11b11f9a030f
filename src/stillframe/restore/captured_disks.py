"""The disks of a snapshot for a restore: what to lay overlays on, and checks that it is unchanged.

Nothing here writes: a captured image is never written to (invariant 11). The restored VM's overlay
has ``backing`` below it, in the format ``backing_format``.
"""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Collection, Iterable, Sequence
from pathlib import Path

import msgspec

from stillframe.disks.images import frozen_file
from stillframe.errors import DataError, NotFoundError, RefusedError
from stillframe.machine.qemu.drive_names import device_id
from stillframe.model import CapturedDisk, DiskRecord, FrozenFile, Manifest
from stillframe.restore.block_nodes import Image, NodeReader, UnknownNode
from stillframe.restore.disk_use import is_written


class CapturedBase(msgspec.Struct, frozen=True, kw_only=True):
    """One disk to restore.

    ``backing``: absolute path of its top image; ``virtual_size_bytes``: of the overlay to make;
    ``files``: ``backing`` and its backing chain.
    """

    disk: CapturedDisk
    label: str
    backing: str
    backing_format: str
    virtual_size_bytes: int
    files: tuple[str, ...] = ()

    def is_of(self, record: DiskRecord) -> bool:
        """Whether it is the disk of this recorded drive."""
        same = (record.device, record.qdev) == (self.disk.device, self.disk.qdev)
        return same and bool(record.device or record.qdev)

    def top(self) -> Image:
        """Return its top image, as a node.

        Raises:
            DataError: its format is not that of an image.
        """
        node = {"driver": "file", "filename": self.backing}
        try:
            image = NodeReader({}, str).image({"driver": self.backing_format, "file": node})
        except UnknownNode as unknown:
            raise DataError(
                f"the snapshot's disk {self.label} is malformed", why=str(unknown)
            ) from unknown
        return msgspec.structs.replace(image, files=self.files)

    def image(self, recorded: Image | None) -> Image:
        """Return the image below the restored VM's overlay.

        Args:
            recorded: the image that the recorded option describes, if that can be read: it says how
                to open a frozen image, and has the key of an encrypted one.
        """
        if recorded is not None and recorded.files and _same(recorded.files[0], self.backing):
            return Image(base=recorded.base, format=recorded.format, files=self.files, remotes=())
        base = self.backing
        if self.backing_format == "luks" and recorded is not None:
            tree = json.loads(recorded.base.removeprefix("json:") if "{" in recorded.base else "{}")
            tree |= {"driver": "luks", "file": {"driver": "file", "filename": base}}
            base = f"json:{json.dumps(tree, separators=(',', ':'))}"
        return Image(base=base, format=self.backing_format, files=self.files, remotes=())


class CapturedDisks:
    """The disks that a snapshot holds, while a plan finds the option of each.

    Args:
        records: the drives of the instant.
    """

    def __init__(
        self, bases: Sequence[CapturedBase] = (), records: Sequence[DiskRecord] = ()
    ) -> None:
        self._bases = tuple(bases)
        self._records = tuple(records)
        self._found: dict[str, CapturedBase | None] = {}

    def __len__(self) -> int:
        return len(self._bases)

    def find(
        self, name: str, *, devices: Iterable[str] = (), files: Iterable[str] = ()
    ) -> CapturedBase | None:
        """Return the disk of one option; each call returns the same.

        Args:
            name: the drive's id or the node's name. devices: ids of the guest's devices on it.
            files: the images that the option names, for a drive whose name does not identify it.
        """
        if name not in self._found or not name:
            self._found[name] = self._by_name(name, set(devices)) or self._by_file(files)
        return self._found[name]

    def unplaced(self) -> list[CapturedBase]:
        """Return the disks without an option."""
        labels = {base.label for base in self._found.values() if base is not None}
        return [base for base in self._bases if base.label not in labels]

    def _by_name(self, name: str, devices: set[str]) -> CapturedBase | None:
        for base in self._bases:
            disk = base.disk
            if name and name in (disk.device, disk.node_name):
                return base
            parts = disk.qdev.split("/")
            own = parts[3] if disk.qdev.startswith("/machine/peripheral/") else disk.qdev
            if own and own in devices:
                return base
        return None

    def _by_file(self, files: Iterable[str]) -> CapturedBase | None:
        wanted = {os.path.realpath(file) for file in files}
        found = [base for base in self.unplaced() if wanted & self._originals(base)]
        return found[0] if len(found) == 1 else None

    def _originals(self, base: CapturedBase) -> set[str]:
        """Return the files that held the disk in the original VM."""
        names = {record.filename for record in self._records if base.is_of(record)}
        if base.disk.kind == "overlay":
            names.update(base.files)
        return {os.path.realpath(name) for name in names if name}


def captured_bases(manifest: Manifest, snapshot_path: str | os.PathLike[str]) -> list[CapturedBase]:
    """Return the disks that a snapshot holds, in the machine's order; none if it has no disks."""
    found = []
    for disk in manifest.captured_disks:
        files = tuple(str(place_of(file, disk, snapshot_path)) for file in disk.files)
        if files:
            base = CapturedBase(
                disk=disk,
                label=disk_label(disk),
                backing=files[0],
                backing_format=disk.files[0].format,
                virtual_size_bytes=disk.virtual_size_bytes,
                files=files,
            )
            found.append(base)
    return found


def place_of(file: FrozenFile, disk: CapturedDisk, snapshot_path: str | os.PathLike[str]) -> Path:
    """Return where a disk's file is now: a copy may have been moved and renamed with its
    snapshot."""
    snapshot = Path(snapshot_path).absolute()
    if disk.kind == "copy" and file.name_beside:
        own = snapshot.with_name(f"{snapshot.name}.disks") / file.name_beside
        if os.path.lexists(own):
            return own
    return snapshot.parent / file.path


def disk_label(disk: CapturedDisk) -> str:
    """Return the name of a disk in plans and messages."""
    return disk.device or device_id(disk.qdev) or disk.node_name


def check_captured(
    manifest: Manifest,
    snapshot_path: str | os.PathLike[str],
    *,
    only: Collection[str] | None = None,
    digests: bool = False,
    step: Callable[[], object] | None = None,
) -> list[str]:
    """Check that every image is the one that the manifest names. The images are only read.

    Args:
        only: the labels of the disks that are used; default: all.
        digests: read images in full where a digest was recorded (``--verify-disks``).
        step: called between two reads; may raise to give up.

    Returns:
        Notes about what could not be checked.

    Raises:
        NotFoundError: an image is gone. DataError: it is another one, or was written to.
        RefusedError: a program, such as a fold, is writing to it.
    """
    notes = []
    for disk in manifest.captured_disks:
        for file in disk.files if only is None or disk_label(disk) in only else ():
            path = str(place_of(file, disk, snapshot_path))
            check_file(path, file, digests=digests, step=step)
            if digests and not file.digest:
                notes.append(f"{path}: no digest was recorded of it; its first MiB, size and time"
                             " are as they were")  # fmt: skip
    return notes


def check_file(
    path: str,
    file: FrozenFile,
    *,
    digests: bool = False,
    step: Callable[[], object] | None = None,
    shown_as: str = "",
) -> None:
    """Check one file, as :func:`check_captured`. ``shown_as``: its name, if ``path`` is not one."""
    shown = shown_as or path
    try:
        found = frozen_file(path, file.format, digest=digests and bool(file.digest), step=step)
    except FileNotFoundError as error:
        raise NotFoundError(
            f"there is no {shown}",
            why="the snapshot's disk lies on it",
            remedy="put it back; copies belong beside the snapshot",
        ) from error
    except OSError as error:
        raise DataError(f"cannot read the disk image {shown}", why=error.strerror) from error
    why = _difference(found, file, digests=digests)
    if why is not None:
        raise DataError(
            f"the disk image {shown} is not what the snapshot was taken with",
            why=why,
            remedy="it was written to, folded or replaced since; restore another snapshot",
        )
    if is_written(path):
        raise RefusedError(
            f"the disk image {shown} is being written to",
            why="another program has it open for writing",
            remedy="wait for a fold to end, or end the VM that was started from it",
            guest_state="none",
        )


def _difference(found: FrozenFile, file: FrozenFile, *, digests: bool) -> str | None:
    if found.size_bytes != file.size_bytes:
        return f"it has {found.size_bytes} bytes, and had {file.size_bytes}"
    if found.head != file.head:
        return "its first MiB is another one"
    if digests and file.digest:
        return "its digest is another one" if found.digest != file.digest else None
    # Copying a copy elsewhere with its snapshot changes its time, but not its digest.
    if not file.digest and found.mtime_ns != file.mtime_ns:
        return "it was written to since"
    return None


def _same(one: str, other: str) -> bool:
    return os.path.realpath(one) == os.path.realpath(other)
