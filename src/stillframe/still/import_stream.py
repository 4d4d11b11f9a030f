"""Conversion of a migration stream into a snapshot file.

Pages are put in new frames, everything else is kept. A live precopy stream sends pages repeatedly:
all records are kept, in order, and the index names the last one of each page.
"""

from __future__ import annotations

import struct
from collections.abc import Callable
from datetime import UTC, datetime
from typing import Final

import msgspec

from stillframe.errors import DataError, UsageError
from stillframe.model import BlockRecord, GpaRange, Manifest
from stillframe.still.frames import LEVEL_DEFAULT
from stillframe.still.import_frames import FrameBuilder
from stillframe.still.pc_layout import ACPI_TABLES_BLOCK, NO_MAP, find_memory_map
from stillframe.still.sealing import DataKey
from stillframe.still.sinks import Sink
from stillframe.still.writer import SnapshotWriter
from stillframe.vmstate import writer as stream_writer
from stillframe.vmstate.devices import (
    GLOBAL_STATE_IDSTR,
    DeviceSection,
    describe,
    with_run_state,
)
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
"""QEMU numbers sections from 0 in the order of registration, so no device has this id."""

_ACPI_LIMIT_BYTES: Final = 16 << 20
_IGNORE_SHARED = "x-ignore-shared"
_REMEDY = "save the VM with default capabilities"
_HOST_PAGE_BYTES = 4096
_COMMAND = struct.Struct(">BHH")
_TYPE_LENGTH = struct.Struct(">BI")
_SUBSECTION = struct.Struct(">BB")
_U32 = struct.Struct(">I")


class Imported(msgspec.Struct, frozen=True, kw_only=True):
    """Facts about an imported stream: the machine type, empty if the stream lacks it, and the
    number of page records."""

    machine_type: str
    data_pages: int
    zero_pages: int


def import_stream(
    source: Source,
    sink: Sink,
    *,
    stillframe_version: str,
    level: int = LEVEL_DEFAULT,
    created: datetime | None = None,
    key: DataKey | None = None,
    progress: Callable[[int], None] | None = None,
) -> str:
    """Read a whole stream and write a snapshot file; return its id.

    Args:
        source: a binary file or pipe; a mapped-ram stream must be seekable.
        sink: committed at the end, aborted if anything fails.
        stillframe_version: for the manifest.
        level: compression level.
        created: for the manifest, UTC; default: now.
        key: encrypts the file.
        progress: called with the bytes of the stream read so far.

    Raises:
        DataError: the stream is damaged, or does not hold a whole VM.
        SinkError: the destination cannot take it.
    """
    with import_writer(sink, level=level, key=key) as snapshot_writer:
        manifest, _ = import_into(
            snapshot_writer,
            source,
            stillframe_version=stillframe_version,
            created=created,
            progress=progress,
        )
        return snapshot_writer.finish(manifest)


def import_writer(sink: Sink, *, level: int, key: DataKey | None) -> SnapshotWriter:
    """Return a writer for :func:`import_into`."""
    return SnapshotWriter(sink, level=level, later_pages_win=True, key=key)


def import_into(
    snapshot_writer: SnapshotWriter,
    source: Source,
    *,
    stillframe_version: str,
    created: datetime | None = None,
    run_state: str | None = None,
    progress: Callable[[int], None] | None = None,
) -> tuple[Manifest, Imported]:
    """Import as :func:`import_stream` does, up to the stream's end; return the manifest to finish
    with.

    Args:
        run_state: replaces the stream's run state, which is that of a VM stopped for saving.
    """
    reader = StreamReader(source)
    with FrameBuilder(snapshot_writer, RAM_SECTION_ID) as frames:
        work = _Import(frames, run_state)
        for event in reader.events():
            work.take(event, reader)
            if progress is not None:
                progress(reader.offset_bytes)
        work.finish(reader.page_bytes)
    memory_map = work.memory_map()
    manifest = Manifest(
        created=(created or datetime.now(UTC)).strftime("%Y-%m-%dT%H:%M:%SZ"),
        mode="import",
        stillframe_version=stillframe_version,
        target_page_bytes=reader.page_bytes,
        stream_bytes=0,
        blocks=work.blocks,
        memory_map=memory_map,
        notes=tuple(work.notes),
    )
    imported = Imported(
        machine_type=work.machine_type or "",
        data_pages=work.data_pages,
        zero_pages=work.zero_pages,
    )
    return manifest, imported


class _Import:
    """Writer of the parser's events to frames, in order."""

    def __init__(self, frames: FrameBuilder, run_state: str | None) -> None:
        self._run_state = run_state
        self.blocks: tuple[BlockRecord, ...] = ()
        self.machine_type: str | None = None
        self.data_pages = 0
        self.zero_pages = 0
        self._frames = frames
        self._ignores_shared = False
        self._devices: list[DeviceSection] = []
        self._footers: bool | None = None
        self._described = False
        self._page_counts: list[int] = []
        self._acpi = bytearray()
        self._acpi_number = -1
        self.notes: list[str] = []
        """Notes for readers of the manifest."""

    def take(self, event: Event, reader: StreamReader) -> None:
        """Take one event.

        Raises:
            DataError: the event cannot be part of a snapshot file.
            SinkError: the destination cannot take a frame.
        """
        frames, page_bytes = self._frames, reader.page_bytes
        if self.blocks and self._footers is None:
            # The parser reports the block list before the section's end, which shows the footer.
            self._footers = reader.footers is not False
            blocks = [(block.idstr, block.used_length_bytes) for block in self.blocks]
            frames.start_ram(blocks, page_bytes, footers=self._footers)
        match event:
            case Pages():
                self._page_counts[event.block_index] += len(event.data) // page_bytes
                self.data_pages += len(event.data) // page_bytes
                frames.add_pages(event.block_index, event.offset_bytes, event.data)
                if event.block_index == self._acpi_number:
                    end = event.offset_bytes + len(event.data)
                    self._acpi[event.offset_bytes : end] = event.data
            case ZeroRun():
                self._page_counts[event.block_index] += event.pages
                self.zero_pages += event.pages
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
        """Flush, and check that the stream held a whole VM.

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
        self.notes.append(f"imported; machine type {self.machine_type or 'unknown'}")
        self.notes += [
            f"block {block.idstr} has no page in the stream"
            for block, pages in zip(self.blocks, self._page_counts, strict=True)
            if pages == 0
        ]

    def memory_map(self) -> tuple[GpaRange, ...]:
        """Return where RAM is; empty, with a note, if the stream does not say."""
        try:
            return find_memory_map(
                self.machine_type or "", self.blocks, self._devices, bytes(self._acpi)
            )
        except UsageError as error:
            self.notes.append(f"{NO_MAP}{error.what}")
            return ()

    def _take_blocks(self, event: RamBlocks, page_bytes: int) -> None:
        self._page_counts = [0] * len(event.blocks)
        for number, block in enumerate(event.blocks):
            if block.idstr == ACPI_TABLES_BLOCK and block.used_length_bytes <= _ACPI_LIMIT_BYTES:
                self._acpi_number = number
                self._acpi = bytearray(block.used_length_bytes)
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
        if section.has_footer != self._footers:
            raise DataError(
                "the stream has no section footers, and pages in the RAM section's start",
                remedy="start the VM without -global migration.send-section-footer=off",
            )
        if self._run_state is not None and section.idstr == GLOBAL_STATE_IDSTR:
            section = with_run_state(section, self._run_state)
        self._devices.append(section)
        self._frames.add_stream(section.raw)


def _configuration(event: Configuration) -> bytes:
    """Return the configuration section without the capabilities: they say how RAM was sent, and
    here it is sent plainly (QEMU ``migration/savevm.c``, ``vmstate_configuration``)."""
    out = stream_writer.configuration_section(event.name)
    if event.target_page_bits is not None:
        out += _subsection("configuration/target-page-bits", _U32.pack(event.target_page_bits))
    if event.uuid is not None:
        out += _subsection("configuration/uuid", event.uuid)
    return out


def _subsection(name: str, body: bytes) -> bytes:
    encoded = name.encode("ascii")
    return _SUBSECTION.pack(SectionType.SUBSECTION, len(encoded)) + encoded + _U32.pack(1) + body
