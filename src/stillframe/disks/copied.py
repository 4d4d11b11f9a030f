"""A disk whose point in time is a copy: how its files get their names and their record."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from stillframe.disks.drives import Drive
from stillframe.disks.images import frozen_file, shown_path
from stillframe.disks.targets import Target
from stillframe.errors import SinkError
from stillframe.model import CapturedDisk, FrozenFile

Step = Callable[[int, int], None]
"""Called with the bytes done and the total; raises to give up."""


def name_copy(
    target: Target, image_format: str, snapshot_directory: str | None, step: Step
) -> FrozenFile:
    """Give a complete copy its name, and read it for its digest.

    Raises:
        SinkError: the copy cannot be named or read; the guest keeps running.
    """
    target.give_name()
    path = str(target.path)
    try:
        return frozen_file(
            path,
            image_format,
            shown_as=shown_path(path, snapshot_directory),
            digest=True,
            step=lambda: step(0, 0),
        )
    except OSError as error:
        raise SinkError(
            f"cannot read the copy {path}", why=error.strerror, guest_state="running"
        ) from error


def copied_disk(drive: Drive, files: Sequence[FrozenFile]) -> CapturedDisk:
    """Return the record of a copy; ``files``: from the top of its chain down."""
    return CapturedDisk(
        device=drive.device,
        qdev=drive.qdev,
        node_name=drive.node,
        kind="copy",
        virtual_size_bytes=drive.virtual_size_bytes,
        files=tuple(files),
    )
