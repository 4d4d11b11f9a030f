"""VMs on a complete image of the cache: they map its files, and all of RAM is there at once.

The mapping is private, so the files stay as they are; QEMU 8.2 and newer opens them read-only, so
nothing punches holes in them either (``qapi/qom.json``, property ``rom``). Unless the cache is on a
tmpfs, the files are on a disk, where the kernel cannot write-protect the mapping
(``mm/userfaultfd.c``: vma_can_userfault): such a VM can be saved only in the mode ``stop``.
"""

from __future__ import annotations

import contextlib
import os
import re
from collections.abc import Mapping, Sequence
from pathlib import Path

import msgspec

from stillframe.errors import HostError
from stillframe.image.cached import ImageCache
from stillframe.image.ram_image import PAGE_BYTES
from stillframe.image.stored import OpenImage, block_name
from stillframe.image.working_set import load_working_set
from stillframe.kernel.proc_maps import file_system_types
from stillframe.restore.on_image import plan_image
from stillframe.restore.records import ImagePlan, RestorePlan, Touch
from stillframe.restore.restored import ImageFile
from stillframe.still.index import KIND_DATA
from stillframe.still.snapshot import Snapshot

_VERSIONED = re.compile(r"-(\d+)\.(\d+)$")


class CompleteImage:
    """A ``Runnable`` that needs no filler. Owns the image of the cache."""

    def __init__(self, image: OpenImage, plan: ImagePlan) -> None:
        """``plan``: for a private mapping."""
        self._image = image
        self.plan = plan

    @property
    def files(self) -> dict[int, int]:
        """Descriptors by block, for ``on_image.put_on_image``."""
        return {number: self._image.fds[number] for number in self.plan.blocks}

    @property
    def inherited(self) -> tuple[int, ...]:
        """Descriptors for the VMs to hold: while one has them, the image is not removed."""
        return (self._image.lock, *self.files.values())

    @property
    def image_files(self) -> tuple[ImageFile, ...]:
        """The files behind the RAM of VMs on this image."""
        found = []
        for block in self._image.record.blocks:
            if block.number in self.plan.blocks:
                status = os.fstat(self._image.fds[block.number])
                found.append(
                    ImageFile(
                        idstr=block.idstr,
                        device=status.st_dev,
                        inode=status.st_ino,
                        changed_ns=block.changed_ns,
                    )
                )
        return tuple(found)

    @property
    def directory(self) -> Path:
        """Where its files are."""
        return self._image.directory

    @property
    def touches(self) -> list[Touch]:
        """Its files, for people; the VMs get descriptors of them."""
        return [
            Touch(kind="file", access="read", target=str(self.directory / block_name(n)), option="")
            for n in self.plan.blocks
        ]

    @property
    def is_in_memory(self) -> bool:
        """Whether the cache is on a tmpfs."""
        device = os.fstat(self._image.lock).st_dev
        return file_system_types(os.getpid()).get((os.major(device), os.minor(device))) == "tmpfs"

    def prefetch(self, snapshot: Snapshot, path: str) -> None:
        """Start reading the recorded working set from the disk."""
        index, files = snapshot.index, self.files
        with contextlib.suppress(OSError):
            for frame in load_working_set(path, snapshot.content_id, index.frame_count):
                for run in index.runs_of_frame(frame):
                    if run.kind == KIND_DATA and run.block in files:
                        start, length = run.first_page * PAGE_BYTES, run.pages * PAGE_BYTES
                        os.posix_fadvise(files[run.block], start, length, os.POSIX_FADV_WILLNEED)

    def begin(self, vms: Mapping[int, tuple[int, int] | None]) -> None:
        """Nothing to do: no page is missing."""

    def sweep(self) -> None:
        """Nothing to do."""

    def check(self) -> None:
        """Nothing to raise: no page is missing."""

    def close(self) -> None:
        """Close the image: the VMs hold what they need."""
        self._image.close()


def find_complete(plans: Sequence[RestorePlan], snapshot: Snapshot) -> CompleteImage | None:
    """Return the image for VMs of a snapshot; None if there is none, or they cannot run on it."""
    plan = plans[0]
    # Another user's QEMU may not open files of ours; a board gets its RAM another way.
    if plan.image.streamed or plan.vmm != "qemu" or plan.run_as is not None:
        return None
    private = plan_image(plan.argv[1:], snapshot.blocks, share=False)
    if private.streamed:
        return None
    try:
        image = ImageCache().open(snapshot.id, snapshot.content_id)
    except HostError:
        return None
    if image is None:
        return None
    lengths = {block.number: block.length_bytes for block in image.record.blocks}
    if any(lengths.get(one.block) != one.size_bytes for one in private.backends):
        image.close()
        return None
    readonly = _has_rom(plan.machine_type)
    return CompleteImage(image, msgspec.structs.replace(private, readonly=readonly))


def _has_rom(machine_type: str) -> bool:
    """Whether a QEMU with this machine type also has the property ``rom``: no QEMU has machine
    types newer than itself."""
    found = _VERSIONED.search(machine_type)
    return found is not None and (int(found[1]), int(found[2])) >= (8, 2)


_NOTE = "on its complete image: 'take' of it needs --mode stop ('--fill' makes one that does not)"


def on_complete(plans: Sequence[RestorePlan], image: CompleteImage) -> list[RestorePlan]:
    """Return the plans with their RAM on a complete image."""
    notes = () if image.is_in_memory else (_NOTE,)
    return [
        msgspec.structs.replace(
            plan,
            image=image.plan,
            complete_image=str(image.directory),
            touches=(*plan.touches, *image.touches),
            notes=(*plan.notes, *notes),
        )
        for plan in plans
    ]
