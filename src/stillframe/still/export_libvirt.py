"""Export as a save image for ``virsh restore`` (libvirt ``src/qemu/qemu_saveimage.h``).

::

    0   16  "LibvirtQemudSave"        28  4  format of the stream: 0 raw, 5 zstd (libvirt 10.4)
    16   4  version, 2                32  4  offset of the cookie in the XML area
    20   4  length of the XML area    36 56  zero
    24   4  1: the domain runs        92     XML, NUL, cookie, NUL, padding; then the stream

Numbers are in the host's byte order.
"""

from __future__ import annotations

import struct
from collections.abc import Iterator
from typing import Final
from xml.etree import ElementTree

from stillframe.errors import DataError, UsageError
from stillframe.model import DomainRecord
from stillframe.still.frames import LEVEL_DEFAULT, BytesLike, compress_frame
from stillframe.still.sinks import Sink
from stillframe.still.snapshot import Snapshot

_HEADER: Final = struct.Struct("=16sIIIII56x")
_MAGIC: Final = b"LibvirtQemudSave"
_VERSION: Final = 2
_FORMAT_RAW: Final = 0
_FORMAT_ZSTD: Final = 5
_ROOM_BYTES: Final = 64 << 10
"""Padding, so that ``virsh save-image-edit`` can make the XML longer."""
_ALIGNMENT_BYTES: Final = 4096
_PIECE_BYTES: Final = 1 << 20
_DEPTH_LIMIT: Final = 64
"""ElementTree serialises elements recursively."""


def save_image_head(xml: str, live_xml: str, *, running: bool, zstd: bool = False) -> bytes:
    """Return a save image without its stream.

    Args:
        xml: of the domain to restore. live_xml: of the domain as it ran, for its ``<cpu>``.
        running: whether the restored domain is to run.
        zstd: the stream is compressed; libvirt pipes it through ``zstd -dc``.

    Raises:
        DataError: the live XML is malformed.
    """
    domain = xml.encode() + b"\0"
    cpu = parse_domain(live_xml or xml).find("cpu")
    cookie = (
        b"<cookie>"
        + (ElementTree.tostring(cpu) if cpu is not None else b"")
        + b"<slirpHelper/></cookie>\0"
    )
    used = _HEADER.size + len(domain) + len(cookie) + _ROOM_BYTES
    total = -(-used // _ALIGNMENT_BYTES) * _ALIGNMENT_BYTES
    header = _HEADER.pack(
        _MAGIC,
        _VERSION,
        total - _HEADER.size,
        int(running),
        _FORMAT_ZSTD if zstd else _FORMAT_RAW,
        len(domain),
    )
    return (header + domain + cookie).ljust(total, b"\0")


def parse_domain(xml: str) -> ElementTree.Element:
    """Parse a recorded domain's XML.

    Raises:
        DataError: it is malformed, or nested deeper than any domain's.
    """
    try:
        root = ElementTree.fromstring(xml)
    except ElementTree.ParseError as error:
        raise DataError("the recorded domain XML is malformed", why=str(error)) from error
    level, depth = [root], 0
    while level:
        depth += 1
        if depth > _DEPTH_LIMIT:
            raise DataError("the recorded domain XML is nested too deeply")
        level = [child for element in level for child in element]
    return root


def domain_of_snapshot(snapshot: Snapshot) -> DomainRecord:
    """Return what the snapshot recorded of its libvirt domain.

    Raises:
        UsageError: it is not of a libvirt domain.
    """
    machine = snapshot.manifest.machine
    if machine is None or machine.domain is None:
        raise UsageError(
            "the snapshot is not of a libvirt domain, so no domain XML is in it",
            remedy="export it as a QEMU stream: --format qemu",
        )
    return machine.domain


def export_libvirt(snapshot: Snapshot, sink: Sink, *, zstd: bool = False) -> None:
    """Write a save image, and commit the sink.

    Args:
        zstd: append the snapshot file itself to the head, in its compressed size; needs libvirt
            10.4. The stream of a chain or an encrypted snapshot is compressed anew.

    Raises:
        UsageError: the snapshot is not of a domain. DataError: it is damaged.
        SinkError: the destination cannot take it.
    """
    try:
        domain = domain_of_snapshot(snapshot)
        machine = snapshot.manifest.machine
        running = machine is not None and machine.guest_state == "running"
        sink.write(save_image_head(domain.xml, domain.live_xml, running=running, zstd=zstd))
        if zstd:
            snapshot.verify()
        for piece in _compressed(snapshot) if zstd else snapshot.iter_stream():
            sink.write(piece)
        sink.commit()
    finally:
        sink.abort()


def _compressed(snapshot: Snapshot) -> Iterator[BytesLike]:
    """Yield what ``zstd -dc`` turns into the stream."""
    if len(snapshot.files) > 1 or snapshot.secrets:
        for piece in snapshot.iter_stream():
            yield compress_frame(piece, LEVEL_DEFAULT).data
        return
    source = snapshot.container.source
    for offset in range(0, source.size_bytes, _PIECE_BYTES):
        yield source.read_at(offset, min(_PIECE_BYTES, source.size_bytes - offset))
