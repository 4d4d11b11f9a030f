"""The events of the stream reader, as frozen records."""

from __future__ import annotations

from typing import TypeAlias

import msgspec

from stillframe.vmstate.devices import DeviceSection


class Header(msgspec.Struct, frozen=True, kw_only=True):
    """The stream's first eight bytes."""

    version: int


class Configuration(msgspec.Struct, frozen=True, kw_only=True):
    """The configuration section.

    ``name``: the machine's class name without ``-machine``. ``capabilities``: those that the stream
    depends on. ``target_page_bits``: None if absent (the target's legacy minimum).
    """

    name: str
    capabilities: tuple[str, ...] = ()
    target_page_bits: int | None = None
    uuid: bytes | None = None


class StreamBlock(msgspec.Struct, frozen=True, kw_only=True):
    """One entry of the RAM block list.

    ``page_size_bytes``: only sent with postcopy. ``address``: the region's offset in its container,
    only sent with x-ignore-shared.
    """

    idstr: str
    used_length_bytes: int
    page_size_bytes: int | None = None
    address: int | None = None


class RamBlocks(msgspec.Struct, frozen=True, kw_only=True):
    """The list of RAM blocks, which ``block_index`` of later events indexes."""

    blocks: tuple[StreamBlock, ...]


class Pages(msgspec.Struct, frozen=True):
    """A run of adjacent pages with content.

    A later run may hold a page again; the last one counts.
    """

    block_index: int
    offset_bytes: int
    data: bytes


class ZeroRun(msgspec.Struct, frozen=True):
    """A run of adjacent zero pages (target pages)."""

    block_index: int
    offset_bytes: int
    pages: int


class Device(msgspec.Struct, frozen=True):
    """One device section; early ones come before the RAM pages."""

    section: DeviceSection


class Command(msgspec.Struct, frozen=True):
    """A COMMAND record that does not change how the stream is read."""

    code: int
    data: bytes


class Eof(msgspec.Struct, frozen=True):
    """The end of the sections."""


class Description(msgspec.Struct, frozen=True, kw_only=True):
    """The vmdescription after EOF.

    ``text``: its JSON, UTF-8. ``sizes_agree``: whether it states the true length of every device
    section, so that tools that rely on it can read the stream; None if it is too large to parse.
    """

    text: bytes
    sizes_agree: bool | None


Event: TypeAlias = (
    Header | Configuration | RamBlocks | Pages | ZeroRun | Device | Command | Eof | Description
)
