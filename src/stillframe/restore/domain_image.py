"""A libvirt domain's RAM on an image.

libvirt's XML cannot express this, but libvirt passes ``<qemu:commandline>`` on: an additional
memory backend becomes the machine's, and the one that libvirt makes stays empty. QEMU opens the
image's file by name, in the domain's own directory. Afterwards that name leads to the directory of
shared memory, where QEMU makes a nameless file: a saved domain (``virsh save``) can start again.
Sources: QEMU ``backends/hostmem-file.c``, ``hw/core/machine.c``, ``softmmu/physmem.c``
(file_ram_open); libvirt ``docs/drvqemu.rst``.
"""

from __future__ import annotations

import contextlib
import itertools
import json
import os
import secrets
import shutil
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from xml.etree import ElementTree

from stillframe.errors import DataError, HostError
from stillframe.model import BlockRecord
from stillframe.restore.on_image import plan_image
from stillframe.restore.option import Option, split_options
from stillframe.restore.option_value import OptionValue
from stillframe.restore.private_directories import PASSABLE, make_owned, remove, sweep
from stillframe.restore.records import ImagePlan

_QEMU = "http://libvirt.org/schemas/domain/qemu/1.0"
_COMMANDLINE, _ARG = f"{{{_QEMU}}}commandline", f"{{{_QEMU}}}arg"
_LIBVIRTS, _OURS = "pc.ram", "sf.ram"
_MACHINE = f"memory-backend={_OURS}"
SHARED_MEMORY = Path("/dev/shm")
_PREFIX = "stillframe-image-"
ElementTree.register_namespace("qemu", _QEMU)


def plan_domain_image(words: Sequence[str], blocks: Sequence[BlockRecord]) -> ImagePlan:
    """Plan whether the domain can run on an image.

    Args:
        words: its command line without the program.

    Raises:
        DataError: the command line is malformed.
    """
    plan = plan_image(words, blocks, share=True)
    if plan.streamed:
        return plan
    if len(plan.backends) > 1 or any(option.name == "numa" for option in _options(words)):
        return ImagePlan(streamed="libvirt's XML cannot change the memory of NUMA nodes or DIMMs")
    backend = plan.backends[0]
    if backend.id not in (_LIBVIRTS, _OURS) or backend.canonical:
        return ImagePlan(streamed=f"its RAM is called {backend.id!r}, not {_LIBVIRTS!r}")
    for option in _options(words):
        if option.name == "object" and OptionValue(option.value, "qom-type").is_on("prealloc"):
            return ImagePlan(streamed="libvirt would allocate all of its RAM twice")
    return plan


def _options(words: Sequence[str]) -> Sequence[Option]:
    return split_options(words, DataError)


def has_own_memory(root: ElementTree.Element) -> bool:
    """Whether the domain was already on an image."""
    return any(arg.get("value") == _MACHINE for arg in root.iter(_ARG))


def put_on_place(root: ElementTree.Element, place: Path, size_bytes: int) -> None:
    """Have the domain's RAM in the file that ``place`` leads to when QEMU starts."""
    line = root.find(_COMMANDLINE)
    if line is None:
        line = ElementTree.SubElement(root, _COMMANDLINE)
    arguments = line.findall(_ARG)
    for name, value in itertools.pairwise(arguments):
        text = value.get("value", "")
        if text == _MACHINE or (f'"{_OURS}"' in text and name.get("value") == "-object"):
            line.remove(name)
            line.remove(value)
    memory = {
        "qom-type": "memory-backend-file",
        "id": _OURS,
        "mem-path": str(place),
        "size": size_bytes,
        "share": True,
        "x-use-canonical-path-for-ramblock-id": False,
    }
    for word in ("-object", json.dumps(memory), "-machine", _MACHINE):
        ElementTree.SubElement(line, _ARG, {"value": word})


def renamed(block: BlockRecord) -> Callable[[bytes], bytes]:
    """Return an edit that renames the block in the stream's list of blocks (``ram_save_setup``)."""

    def entry(name: str) -> bytes:
        return bytes((len(name),)) + name.encode() + block.used_length_bytes.to_bytes(8, "big")

    return lambda piece: piece.replace(entry(_LIBVIRTS), entry(_OURS))


class ImagePlace:
    """Image files that libvirt's QEMU may open, until ``close``.

    Args:
        place: the name under which QEMU opens them.
        uid: QEMU's user.

    Raises:
        HostError: shared memory lacks room, or a file cannot be made.
    """

    def __init__(self, place: Path, uid: int, *, needed_bytes: int) -> None:
        self._place = place
        self._uid = uid
        sweep(SHARED_MEMORY, _PREFIX)
        try:
            status = os.statvfs(SHARED_MEMORY)
        except OSError as error:
            raise HostError(f"there is no {SHARED_MEMORY}", why=error.strerror) from error
        if status.f_bavail * status.f_frsize < needed_bytes:
            raise HostError(
                f"{SHARED_MEMORY} has {status.f_bavail * status.f_frsize >> 20} MiB of room, the"
                f" image takes {needed_bytes >> 20}"
            )
        self._directory = SHARED_MEMORY / f"{_PREFIX}{secrets.token_hex(8)}"
        self._lock_fd = make_owned(self._directory)
        self._directory.chmod(PASSABLE)

    def make_file(self, number: int) -> int:
        """Make a block's file and return its descriptor, as ``RamImage.make`` wants it."""
        path = self._directory / str(number)
        flags = os.O_RDWR | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC
        fd = os.open(path, flags, 0o600)
        os.fchown(fd, self._uid, -1)
        lead(self._place, path)
        return fd

    def is_open(self) -> None:
        """Lead the name elsewhere: QEMU has opened the file, and nothing else may."""
        lead(self._place, SHARED_MEMORY)
        shutil.rmtree(self._directory, ignore_errors=True)

    def close(self) -> None:
        remove(self._directory)
        os.close(self._lock_fd)


def lead(place: Path, to: Path) -> None:
    """Make the name ``place`` lead to ``to``, atomically.

    Raises:
        OSError: not possible.
    """
    new = place.with_name(f".{place.name}.new")
    with contextlib.suppress(FileNotFoundError):
        new.unlink()
    new.symlink_to(to)
    new.replace(place)


@contextlib.contextmanager
def image_place(place: Path, uid: int, *, needed_bytes: int) -> Iterator[ImagePlace]:
    """Make an :class:`ImagePlace` for a ``with`` block."""
    made = ImagePlace(place, uid, needed_bytes=needed_bytes)
    try:
        yield made
    finally:
        made.close()
