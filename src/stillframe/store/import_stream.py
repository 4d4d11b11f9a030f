"""Turns any migration stream that the parser reads into a snapshot file.

The pages are framed anew, everything else is kept. A live precopy stream sends pages several
times: all records are kept, in order, and the index names the last one of each page.
"""

from __future__ import annotations

import struct
from collections.abc import Callable
from datetime import UTC, datetime
from typing import Final

from stillframe.errors import DataError
from stillframe.model import BlockRecord, Manifest
from stillframe.store.backends import Sink
from stillframe.store.frames import LEVEL_DEFAULT
from stillframe.store.import_frames import FrameBuilder
from stillframe.store.pc_layout import assumed_memory_map
from stillframe.store.writer import SnapshotWriter
from stillframe.vmstate import writer as stream_writer
from stillframe.vmstate.devices import DeviceSection, describe, section_footer
from stillframe.vmstate.reader import StreamReader
from stillframe.vmstate.records import (
    Command,
    Configuration,
    Description,
    Device,
    Eof,
    Event,
    Header,
    Pages,
    RamBlocks,
    ZeroRun,
)
from stillframe.vmstate.source import Source
from stillframe.vmstate.wire import CommandCode, SectionType

RAM_SECTION_ID: Final = 0x7FFFFFFF
"""QEMU numbers sections from 0 in the order of registration, so no device has this one."""

_IGNORE_SHARED = "x-ignore-shared"
_REMEDY = "save the VM with default capabilities"
_HOST_PAGE_BYTES = 4096
_COMMAND = struct.Struct(">BHH")
_TYPE_LENGTH = struct.Struct(">BI")
_SUBSECTION = struct.Struct(">BB")
_U32 = struct.Struct(">I")


def import_stream(
    source: Source,
    sink: Sink,
    *,
    stillframe_version: str,
    level: int = LEVEL_DEFAULT,
    created: datetime | None = None,
    progress: Callable[[int], None] | None = None,
) -> str:
    """Read a whole stream and write a snapshot file; returns its id.

    Args:
        source: a binary file or pipe; a mapped-ram stream needs a seekable one.
        sink: committed at the end, aborted if anything goes wrong.
        stillframe_version: for the manifest.
        level: compression level.
        created: for the manifest, UTC; now, if not given.
        progress: called with the bytes of the stream read so far.

    Raises:
        DataError: the stream is damaged, or does not hold a whole VM.
        SinkError: the destination cannot take it.
    """
    with SnapshotWriter(sink, level=level, later_pages_win=True) as snapshot_writer:
        reader = StreamReader(source)
        with FrameBuilder(snapshot_writer, RAM_SECTION_ID) as frames:
            work = _Import(frames)
            for event in reader.events():
                work.take(event, reader.page_bytes)
                if progress is not None:
                    progress(reader.offset_bytes)
            work.finish(reader.page_bytes)
        manifest = Manifest(
            created=(created or datetime.now(UTC)).strftime("%Y-%m-%dT%H:%M:%SZ"),
            mode="import",
            stillframe_version=stillframe_version,
            target_page_bytes=reader.page_bytes,
            stream_bytes=0,
            blocks=work.blocks,
            memory_map=assumed_memory_map(work.machine_type, work.blocks),
            notes=tuple(work.notes()),
        )
        return snapshot_writer.finish(manifest)


class _Import:
    """Passes the parser's events on, in their order."""

    def __init__(self, frames: FrameBuilder) -> None:
        self.blocks: tuple[BlockRecord, ...] = ()
        self.machine_type: str | None = None
        self._frames = frames
        self._ignores_shared = False
        self._devices: list[DeviceSection] = []
        self._described = False
        self._page_counts: list[int] = []

    def take(self, event: Event, page_bytes: int) -> None:
        """Take one event.

        Raises:
            DataError: something that a snapshot file cannot hold.
            SinkError: the destination cannot take a frame.
        """
        frames = self._frames
        match event:
            case Pages():
                self._page_counts[event.block_index] += len(event.data) // page_bytes
                frames.add_pages(event.block_index, event.offset_bytes, event.data)
            case ZeroRun():
                self._page_counts[event.block_index] += event.pages
                frames.add_zeroes(event.block_index, event.offset_bytes, event.pages)
            case Header():
                frames.add_stream(stream_writer.stream_header())
            case Configuration():
                self.machine_type = event.name
                self._ignores_shared = _IGNORE_SHARED in event.capabilities
                frames.add_stream(_configuration(event))
            case RamBlocks():
                self._take_blocks(event, page_bytes)
            case Device():
                self._take_device(event.section)
            case Command():
                if event.code == CommandCode.SWITCHOVER_START:  # the others need a live peer
                    frames.add_stream(
                        _COMMAND.pack(SectionType.COMMAND, event.code, len(event.data))
                    )
                    frames.add_stream(event.data)
            case Eof():
                frames.add_stream(stream_writer.eof())
            case Description():
                self._described = True
                frames.add_stream(_TYPE_LENGTH.pack(SectionType.VMDESCRIPTION, len(event.text)))
                frames.add_stream(event.text)

    def finish(self, page_bytes: int) -> None:
        """Write what is left, and check that the stream held a whole VM.

        Raises:
            DataError: it did not.
        """
        if not any(self._page_counts):
            raise DataError(
                "the stream holds no RAM",
                why="its pages went through other channels, or RAM was left out as shared",
                remedy=_REMEDY,
            )
        for block, pages in zip(self.blocks, self._page_counts, strict=True):
            if self._ignores_shared and pages == 0:
                raise DataError(
                    f"the stream leaves out RAM block {block.idstr!r}",
                    why=f"it was saved with capability {_IGNORE_SHARED}",
                    remedy=_REMEDY,
                )
        if not self._described:
            description = describe(self._devices, target_page_bytes=page_bytes)
            self._frames.add_stream(stream_writer.vmdescription(description))
        self._frames.flush()

    def notes(self) -> list[str]:
        """What a reader of the manifest should know."""
        notes = [f"imported; machine type {self.machine_type or 'unknown'}"]
        notes += [
            f"block {block.idstr} has no page in the stream"
            for block, pages in zip(self.blocks, self._page_counts, strict=True)
            if pages == 0
        ]
        return notes

    def _take_blocks(self, event: RamBlocks, page_bytes: int) -> None:
        blocks = [(block.idstr, block.used_length_bytes) for block in event.blocks]
        self._frames.add_stream(stream_writer.ram_start_section(blocks, section_id=RAM_SECTION_ID))
        self._frames.set_blocks([block.idstr for block in event.blocks], page_bytes)
        self._page_counts = [0] * len(blocks)
        self.blocks = tuple(
            BlockRecord(
                idstr=block.idstr,
                used_length_bytes=block.used_length_bytes,
                page_size_bytes=block.page_size_bytes or max(page_bytes, _HOST_PAGE_BYTES),
            )
            for block in event.blocks
        )

    def _take_device(self, section: DeviceSection) -> None:
        if section.section_id == RAM_SECTION_ID:
            raise DataError(f"section {section.idstr!r} has the odd id {RAM_SECTION_ID:#x}")
        if not section.raw.endswith(section_footer(section.section_id)):
            raise DataError(
                "the stream has no section footers",
                remedy="start the VM without -global migration.send-section-footer=off",
            )
        self._devices.append(section)
        self._frames.add_stream(section.raw)


def _configuration(event: Configuration) -> bytes:
    """The configuration section, less the capabilities: they say how RAM was sent, and here
    it is sent plainly (QEMU ``migration/savevm.c``, ``vmstate_configuration``)."""
    out = stream_writer.configuration_section(event.name)
    if event.target_page_bits is not None:
        out += _subsection("configuration/target-page-bits", _U32.pack(event.target_page_bits))
    if event.uuid is not None:
        out += _subsection("configuration/uuid", event.uuid)
    return out


def _subsection(name: str, body: bytes) -> bytes:
    encoded = name.encode("ascii")
    return _SUBSECTION.pack(SectionType.SUBSECTION, len(encoded)) + encoded + _U32.pack(1) + body
