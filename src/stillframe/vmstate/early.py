"""Device sections before the RAM pages, whose ends must be found without seeing the stream's.

Only virtio-mem has one (QEMU 8.0 and later). Its layout is fixed, so its length is known from
its own fields: QEMU ``hw/virtio/virtio-mem.c``, ``vmstate_virtio_mem_device_early``.
"""

from __future__ import annotations

from struct import Struct

from stillframe.errors import DataError
from stillframe.vmstate.devices import EARLY_SUFFIX, DeviceSection, section_footer
from stillframe.vmstate.footers import FOOTER_BYTES, SectionHeader
from stillframe.vmstate.source import StreamSource

_HEAD = Struct(">BIB")
_TAIL = Struct(">II")
_FIXED = Struct(">QQQIQ")
"""Address, region size, block size, node, plugged size; then a bitmap with a bit per block."""
_KNOWN_VERSION = 1


def peek_full_header(source: StreamSource) -> SectionHeader:
    """The header of the FULL section that starts here, without taking it.

    Raises:
        DataError: truncated, or its name is malformed.
    """
    offset = source.offset
    what = "a device section's header"
    source.need(_HEAD.size, what)
    _, section_id, name_length = _HEAD.unpack_from(source.buffer, source.position)
    size = _HEAD.size + name_length + _TAIL.size
    source.need(size, what)
    name_start = source.position + _HEAD.size
    name = source.buffer[name_start : name_start + name_length]
    if not name or not name.isascii() or not name.decode("ascii").isprintable():
        raise DataError(
            "a device section's name is malformed", why=f"{name[:40]!r}", offset_bytes=offset
        )
    instance_id, version_id = _TAIL.unpack_from(source.buffer, name_start + name_length)
    return SectionHeader(
        offset, section_id, name.decode("ascii"), instance_id, version_id, offset + size
    )


def read_early_section(
    source: StreamSource, header: SectionHeader, *, limit_bytes: int
) -> DeviceSection:
    """Take the early section whose header was peeked.

    Raises:
        DataError: not a version that is known, truncated, too large, or without its footer.
    """
    header_bytes = header.payload_start - header.start
    what = f"section '{header.idstr}'"
    if header.version_id != _KNOWN_VERSION:
        raise DataError(
            f"{what} has version {header.version_id}, only {_KNOWN_VERSION} is known",
            offset_bytes=header.start,
        )
    source.need(header_bytes + _FIXED.size, what)
    _, region_bytes, block_bytes, _, _ = _FIXED.unpack_from(
        source.buffer, source.position + header_bytes
    )
    blocks = region_bytes // block_bytes if block_bytes else 0
    payload_bytes = _FIXED.size + -(-blocks // 64) * 8
    if blocks == 0 or payload_bytes > limit_bytes:
        raise DataError(
            f"{what} has an impossible size",
            why=f"{region_bytes} bytes of memory in blocks of {block_bytes}",
            offset_bytes=header.payload_start,
        )
    raw = source.take(header_bytes + payload_bytes + FOOTER_BYTES, what)
    if raw[-FOOTER_BYTES:] != section_footer(header.section_id):
        raise DataError(
            f"{what} has no footer",
            why="it is damaged, or the machine was started with send-section-footer off",
            offset_bytes=header.payload_start + payload_bytes,
        )
    return DeviceSection(
        section_id=header.section_id,
        idstr=header.idstr,
        instance_id=header.instance_id,
        version_id=header.version_id,
        payload=raw[header_bytes:-FOOTER_BYTES],
        raw=raw,
    )


def is_early_header(header: SectionHeader) -> bool:
    """Whether this section is one that comes before the RAM pages."""
    return header.idstr.endswith(EARLY_SUFFIX)
