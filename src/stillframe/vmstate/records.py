"""What the stream reader yields: one frozen record for each thing in a migration stream."""

from __future__ import annotations

from typing import TypeAlias

import msgspec

from stillframe.vmstate.devices import DeviceSection


class Header(msgspec.Struct, frozen=True, kw_only=True):
    """The stream's first eight bytes."""

    version: int


class Configuration(msgspec.Struct, frozen=True, kw_only=True):
    """The configuration section.

    ``name``: the machine's class name without ``-machine``. ``capabilities``: those that the
    stream depends on. ``target_page_bits``: None if not sent (the target's legacy minimum).
    """

    name: str
    capabilities: tuple[str, ...] = ()
    target_page_bits: int | None = None
    uuid: bytes | None = None


class StreamBlock(msgspec.Struct, frozen=True, kw_only=True):
    """One entry of the RAM block list.

    ``page_size_bytes``: only sent with postcopy. ``address``: only sent with
    x-ignore-shared, the region's offset in its container.
    """

    idstr: str
    used_length_bytes: int
    page_size_bytes: int | None = None
    address: int | None = None


class RamBlocks(msgspec.Struct, frozen=True, kw_only=True):
    """The list of RAM blocks; ``block_index`` of later records counts in it."""

    blocks: tuple[StreamBlock, ...]


class Pages(msgspec.Struct, frozen=True):
    """A run of neighbouring pages with their content.

    A later run may hold a page again; the later one counts.
    """

    block_index: int
    offset_bytes: int
    data: bytes


class ZeroRun(msgspec.Struct, frozen=True):
    """A run of neighbouring target pages that hold only zeroes."""

    block_index: int
    offset_bytes: int
    pages: int


class Device(msgspec.Struct, frozen=True):
    """One device section; the early ones come before the RAM pages."""

    section: DeviceSection


class Command(msgspec.Struct, frozen=True):
    """A COMMAND record that does not change how the stream is read."""

    code: int
    data: bytes


class Eof(msgspec.Struct, frozen=True):
    """The end of the sections."""


class Description(msgspec.Struct, frozen=True, kw_only=True):
    """The vmdescription after EOF.

    ``text``: its JSON, UTF-8. ``sizes_agree``: whether it describes every device section with
    exactly the length that it has, so that tools which go by it can read the stream; None if
    it is too large to be looked at.
    """

    text: bytes
    sizes_agree: bool | None


Event: TypeAlias = (
    Header | Configuration | RamBlocks | Pages | ZeroRun | Device | Command | Eof | Description
)


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
