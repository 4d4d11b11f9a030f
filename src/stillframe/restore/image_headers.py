"""The other files that a disk image names in its own header; QEMU opens them with it.

Sources: QEMU ``docs/interop/qcow2.rst`` and ``qed_spec.rst``, ``block/qcow.c``, ``block/vmdk.c``.
QEMU itself refuses VHDX, VPC and VDI images with a parent.
"""

from __future__ import annotations

import os
import re
import stat
import struct
from collections.abc import Callable, Iterator
from pathlib import Path

import msgspec

from stillframe.restore.block_nodes import FILES, Image, NodeReader, UnknownNode

_HEADED = ("qcow2", "qcow", "qed", "vmdk")
_HEAD_BYTES = 2 << 20
"""The largest qcow2 cluster; all names are in the first one."""
_QCOW2_DATA_FILE = 1 << 2
_BACKING_FORMAT, _DATA_FILE = 0xE2792ACA, 0x44415441
_QED_BACKING, _QED_RAW_BACKING = 1, 4
_SECTOR_BYTES = 512
_EXTENT = re.compile(r'\b(?:RW|RDONLY|NOACCESS)\s+[+-]?\d+\s*(\S{1,10})\s*"([^"\r\n]+)"')
_PARENT = "parentFileNameHint"
_TOO_FAR = "what stands too far behind to be read"


class Named(msgspec.Struct, frozen=True, kw_only=True):
    """A file that a header names. ``role``: the child node that it becomes. ``format``: empty if
    QEMU probes it."""

    role: str
    name: str
    format: str = ""


def named_images(image: Image) -> Iterator[tuple[str, Image | str]]:
    """Yield all that QEMU opens beyond the nodes of ``image`` because headers name it, at any
    depth, each with the file that names it. A text stands for a name unknown to Stillframe."""
    waiting, seen = [image.tree], set(image.files)
    read: set[tuple[str, str]] = set()  # a header may name its own file, by way of others
    while waiting:
        tree = waiting.pop()
        waiting += [child for child in tree.values() if isinstance(child, dict)]
        file, driver = tree.get("file"), tree.get("driver", "")
        if driver in FILES or not isinstance(file, dict):
            continue
        if "filename" not in file:  # on a network, or within another image
            if driver in _HEADED and "backing" not in tree:
                yield f"the {driver} image", "what is not known before it is opened"
            continue
        holder = str(file["filename"])
        if (holder, driver) in read:
            continue
        read.add((holder, driver))
        for named in named_in(holder, driver):
            if named.role in tree:
                continue  # the command line says otherwise
            if not named.name:
                yield holder, _TOO_FAR
                continue
            reader = NodeReader({}, _beside(holder), only_content=True)
            try:
                found = reader.drive_image(
                    {"driver": named.format} if named.format else {}, named.name
                )
            except UnknownNode as unknown:
                yield holder, f"{named.name} ({unknown})"
                continue
            if not seen.issuperset(found.files) or found.remotes:
                seen.update(found.files)
                waiting.append(found.tree)
                yield holder, found


def named_in(path: str, image_format: str) -> list[Named]:
    """Return what an image's header names; nothing if the file is not regular, or not readable.

    Args:
        image_format: empty if QEMU probes it.
    """
    head = _head(path) if not image_format or image_format in _HEADED else b""
    reader = next((read for magic, read in _READERS.items() if head.startswith(magic)), None)
    if reader is None and (image_format == "vmdk" or (not image_format and _is_descriptor(head))):
        reader = _vmdk
    try:
        return list(reader(head)) if reader is not None else []
    except struct.error:
        return []  # truncated: QEMU does not open it either


def _beside(holder: str) -> Callable[[str], str]:
    """Return a resolver: names are relative to the image that has them."""
    return lambda name: os.path.normpath(Path(holder).parent / name)


def _head(path: str) -> bytes:
    """Read a regular file's head; open nothing else, even if it takes that name meanwhile."""
    try:
        place = os.open(path, os.O_PATH | os.O_CLOEXEC)
    except (OSError, ValueError):
        return b""
    try:
        if not stat.S_ISREG(os.fstat(place).st_mode):
            return b""
        with open(f"/proc/self/fd/{place}", "rb") as file:  # noqa: PTH123 - no path
            return file.read(_HEAD_BYTES)
    except OSError:
        return b""
    finally:
        os.close(place)


def _qcow(head: bytes) -> Iterator[Named]:
    """Read the header of qcow or qcow2."""
    version, offset, size = struct.unpack_from(">IQI", head, 4)
    features, start = 0, 72
    if version >= 3:
        (features,) = struct.unpack_from(">Q", head, 72)
        (start,) = struct.unpack_from(">I", head, 100)
    found = list(_extensions(head[: offset or len(head)], start)) if version >= 2 else []
    if offset and size:
        formats = [_text(data) for kind, data in found if kind == _BACKING_FORMAT]
        name = _text(head[offset : offset + size])
        yield Named(role="backing", name=name, format=formats[-1] if formats else "")
    for kind, data in found:
        if features & _QCOW2_DATA_FILE and kind == _DATA_FILE:
            yield Named(role="data-file", name=_text(data), format="raw")


def _extensions(head: bytes, at: int) -> Iterator[tuple[int, bytes]]:
    while at + 8 <= len(head):
        kind, size = struct.unpack_from(">II", head, at)
        if kind == 0:
            return
        yield kind, head[at + 8 : at + 8 + size]
        at += 8 + (size + 7) // 8 * 8


def _qed(head: bytes) -> Iterator[Named]:
    (features,) = struct.unpack_from("<Q", head, 16)
    offset, size = struct.unpack_from("<II", head, 56)
    if features & _QED_BACKING:
        raw = "raw" if features & _QED_RAW_BACKING else ""
        yield Named(role="backing", name=_text(head[offset : offset + size]), format=raw)


def _is_descriptor(head: bytes) -> bool:
    """Whether the first line that is not a comment is the version (``vmdk_probe``)."""
    lines = (line.strip() for line in head.splitlines())
    first = next((line for line in lines if line and not line.startswith(b"#")), b"")
    return first.startswith(b"version=")


def _vmdk(head: bytes) -> Iterator[Named]:
    """Read a descriptor, or a sparse extent that may hold two: one where its header says, and one
    at 512, for the parent. Look for both everywhere."""
    if head.startswith(b"KDMV"):
        offset, size = struct.unpack_from("<QQ", head, 28)
        if (offset + size) * _SECTOR_BYTES > _HEAD_BYTES:
            yield Named(role="extents", name="")
    text = head.decode(errors="surrogateescape")
    for kind, name in _EXTENT.findall(text):
        flat = kind in ("FLAT", "VMFS")
        yield Named(role="extents", name=name, format="raw" if flat else "vmdk")
    _before, found, behind = text.partition(_PARENT)
    name, quote, _rest = behind[2:].partition('"')
    if found and quote:
        yield Named(role="backing", name=name.partition("\0")[0], format="vmdk")


def _text(data: bytes) -> str:
    return data.partition(b"\0")[0].decode(errors="surrogateescape")


_READERS = {b"QFI\xfb": _qcow, b"QED\0": _qed, b"KDMV": _vmdk}
