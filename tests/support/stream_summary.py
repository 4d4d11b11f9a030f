"""What a whole migration stream holds, counted."""

from __future__ import annotations

import struct
from collections.abc import Iterable

import msgspec

from stillframe.vmstate.devices import (
    GLOBAL_STATE_IDSTR,
    DeviceSection,
    find_section,
    unpack_run_state,
)
from stillframe.vmstate.ram_reader import PageLookup
from stillframe.vmstate.reader import DEVICE_LIMIT_BYTES, StreamReader
from stillframe.vmstate.records import (
    Configuration,
    Description,
    Device,
    Pages,
    RamBlocks,
    ZeroRun,
)
from stillframe.vmstate.source import Source


class BlockSummary(msgspec.Struct, frozen=True, kw_only=True):
    """How often pages of one block came in the stream, target pages.

    ``pages``: how many the block has. A page that came twice is counted twice.
    """

    idstr: str
    used_length_bytes: int
    pages: int
    data_pages: int
    zero_pages: int

    @property
    def missing_pages(self) -> int:
        """Pages that did not come: exact if none came twice, else at least so many.

        They are ignored shared RAM, unplugged memory, or the stream is an incremental one.
        """
        return max(0, self.pages - self.data_pages - self.zero_pages)


class StreamSummary(msgspec.Struct, frozen=True, kw_only=True):
    """What a whole stream holds."""

    stream_bytes: int
    machine_type: str | None
    capabilities: tuple[str, ...]
    target_page_bytes: int
    blocks: tuple[BlockSummary, ...]
    devices: tuple[str, ...]
    device_bytes: int
    has_description: bool
    description_sizes_agree: bool | None


def verify_stream(
    source: Source,
    *,
    page_lookup: PageLookup | None = None,
    device_limit_bytes: int = DEVICE_LIMIT_BYTES,
) -> StreamSummary:
    """Parse a stream to its end and count what it holds.

    Raises:
        DataError: as :meth:`StreamReader.events`.
    """
    reader = StreamReader(source, page_lookup=page_lookup, device_limit_bytes=device_limit_bytes)
    machine_type: str | None = None
    capabilities: tuple[str, ...] = ()
    blocks: tuple[tuple[str, int], ...] = ()
    data_pages: list[int] = []
    zero_pages: list[int] = []
    devices: list[str] = []
    device_bytes = 0
    description: Description | None = None
    for event in reader.events():
        match event:
            case Pages():
                data_pages[event.block_index] += len(event.data) // reader.page_bytes
            case ZeroRun():
                zero_pages[event.block_index] += event.pages
            case Configuration():
                machine_type = event.name
                capabilities = event.capabilities
            case RamBlocks():
                blocks = tuple((b.idstr, b.used_length_bytes) for b in event.blocks)
                data_pages = [0] * len(blocks)
                zero_pages = [0] * len(blocks)
            case Device():
                devices.append(event.section.idstr)
                device_bytes += len(event.section.raw)
            case Description():
                description = event
            case _:
                pass
    return StreamSummary(
        stream_bytes=reader.offset_bytes,
        machine_type=machine_type,
        capabilities=capabilities,
        target_page_bytes=reader.page_bytes,
        blocks=tuple(
            BlockSummary(
                idstr=idstr,
                used_length_bytes=used_length_bytes,
                pages=used_length_bytes // reader.page_bytes,
                data_pages=data_pages[index],
                zero_pages=zero_pages[index],
            )
            for index, (idstr, used_length_bytes) in enumerate(blocks)
        ),
        devices=tuple(devices),
        device_bytes=device_bytes,
        has_description=description is not None,
        description_sizes_agree=description.sizes_agree if description else None,
    )


def run_state(sections: Iterable[DeviceSection]) -> str:
    """The run state in the ``globalstate`` section: the VM's state after loading.

    Raises:
        DataError: the section is malformed.
    """
    section = find_section(sections, GLOBAL_STATE_IDSTR)
    assert section is not None, "there is no globalstate section"
    (size,) = struct.unpack_from(">I", section.payload)
    return unpack_run_state(size, section.payload[4:])
