"""Device sections before the RAM pages, which must be cut before the rest of the stream arrives.

Only virtio-mem has one (QEMU 8.0 and later). Its own fields state its length: QEMU
``hw/virtio/virtio-mem.c``, ``vmstate_virtio_mem_device_early``.
"""

from __future__ import annotations

from struct import Struct

from stillframe.errors import DataError
from stillframe.vmstate.devices import DeviceSection, is_early_idstr, make_section
from stillframe.vmstate.footers import HEADER_LIMIT_BYTES, SectionHeader, read_header
from stillframe.vmstate.source import StreamSource

_FIXED = Struct(">QQQIQ")
"""Address, region size, block size, node, plugged size; then a bitmap with a bit per block."""
_KNOWN_VERSION = 1


def read_early_section(
    source: StreamSource, *, limit_bytes: int, footer: bool
) -> DeviceSection | None:
    """Take the FULL section that starts here if it is an early one; otherwise leave it and return
    None.

    Args:
        footer: whether the stream's sections have footers.

    Raises:
        DataError: an unknown version, truncated, too large, or without its footer.
    """
    source.prefetch(HEADER_LIMIT_BYTES)
    header = read_header(source.buffer, source.position)
    if header is None or not is_early_idstr(header.idstr):
        return None
    offset = source.offset
    what = f"section '{header.idstr}'"
    if header.version_id != _KNOWN_VERSION:
        raise DataError(
            f"{what} has version {header.version_id}, only {_KNOWN_VERSION} is known",
            offset_bytes=offset,
        )
    header_bytes = header.payload_start - header.start
    payload_bytes = _payload_bytes(source, header, what, limit_bytes)
    start = source.take(header_bytes + payload_bytes, what)
    section = make_section(
        section_id=header.section_id,
        idstr=header.idstr,
        instance_id=header.instance_id,
        version_id=header.version_id,
        payload=start[header_bytes:],
        footer=footer,
    )
    end = section.raw[len(start) :]
    if source.take(len(end), what) != end:
        raise DataError(
            f"{what} has no footer",
            why="the stream is damaged",
            offset_bytes=offset + len(start),
        )
    return section


def _payload_bytes(source: StreamSource, header: SectionHeader, what: str, limit_bytes: int) -> int:
    header_bytes = header.payload_start - header.start
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
            offset_bytes=source.offset + header_bytes,
        )
    return payload_bytes
