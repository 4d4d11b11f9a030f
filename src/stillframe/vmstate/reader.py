"""A strict parser of QEMU's migration stream, version 3, with bounded memory.

It reads streams of QEMU 6 to 10.2: configuration, RAM with whole, zero, XBZRLE and compressed
pages, mapped-ram, device sections, informational commands, description. It refuses by name what
does not hold the whole VM: postcopy, COLO, RDMA, multifd, other iterable sections (``block``,
``dirty-bitmap``, VFIO). A multifd stream is recognized by its flush records (QEMU 8.1 and later),
by its channels' magic, or by holding only zero pages, and not all pages (up to 8.0).

Sources: QEMU ``migration/savevm.c`` (``qemu_loadvm_state``), ``migration/ram.c``.
"""

from __future__ import annotations

from collections.abc import Iterator

from stillframe.errors import DataError
from stillframe.vmstate.commands import read_command
from stillframe.vmstate.configuration import (
    CAPABILITY_IGNORE_SHARED,
    CAPABILITY_MAPPED_RAM,
    read_configuration,
)
from stillframe.vmstate.description import (
    DESCRIPTION_LIMIT_BYTES,
    described_sizes,
    follow_sizes,
    split_description,
)
from stillframe.vmstate.devices import is_essential, section_from_span
from stillframe.vmstate.early import read_early_section
from stillframe.vmstate.footers import cut_sections
from stillframe.vmstate.ram_reader import PageLookup, RamReader
from stillframe.vmstate.records import (
    Configuration,
    Description,
    Device,
    Eof,
    Event,
)
from stillframe.vmstate.source import Source, StreamSource
from stillframe.vmstate.stream_header import read_stream_header
from stillframe.vmstate.wire import (
    RAM_IDSTR,
    RAM_INSTANCE_ID,
    RAM_VERSION,
    CommandCode,
    SectionType,
)

DEVICE_LIMIT_BYTES = 64 << 20
DEFAULT_PAGE_BYTES = 4096

_COMMAND_LIMIT = 1 << 16
_EARLY_LIMIT = 4096
"""A stream with more commands or early sections is hostile; each is an event."""


class StreamReader:
    """A parser of one stream, for one pass.

    Args:
        source: a file or pipe at the stream's start, read to its end, never further than needed.
            With ``seek`` and ``tell`` it may hold mapped-ram.
        page_lookup: returns a page's content after the pages yielded so far, for XBZRLE.
        device_limit_bytes: how much of device sections may be held in memory.
        page_bytes: the target's page size, unless the stream states it.
    """

    def __init__(
        self,
        source: Source,
        *,
        page_lookup: PageLookup | None = None,
        device_limit_bytes: int = DEVICE_LIMIT_BYTES,
        page_bytes: int = DEFAULT_PAGE_BYTES,
    ) -> None:
        self._source = StreamSource(source)
        self._page_lookup = page_lookup
        self._device_limit_bytes = device_limit_bytes
        self._configuration: Configuration | None = None
        self._ram: RamReader | None = None
        self._ram_id = 0
        self._footers: bool | None = None
        self._postcopy_advised = False
        self.page_bytes = page_bytes

    @property
    def offset_bytes(self) -> int:
        """Bytes of the stream parsed so far."""
        return self._source.offset

    @property
    def footers(self) -> bool | None:
        """Whether sections have footers; None before the first RAM section was read."""
        return self._footers

    @property
    def ram_section_id(self) -> int:
        """The id of the RAM sections; 0 before the first."""
        return self._ram_id

    def events(self) -> Iterator[Event]:
        """Yield the stream's content in order while reading it.

        Raises:
            DataError: the stream is damaged, truncated, hostile or of a refused kind; with the
                offset at which the reader noticed.
        """
        source = self._source
        yield read_stream_header(source)
        if source.peek() == SectionType.CONFIGURATION:
            source.take(1, "the configuration section")
            self._configuration = read_configuration(source)
            if self._configuration.target_page_bits is not None:
                self.page_bytes = 1 << self._configuration.target_page_bits
            yield self._configuration
        commands = early_sections = 0
        while True:
            start = source.offset
            kind = source.peek()
            if kind == SectionType.COMMAND:
                commands += 1
                if commands > _COMMAND_LIMIT:
                    raise DataError(
                        f"the stream has more than {_COMMAND_LIMIT} commands", offset_bytes=start
                    )
                source.take(1, "a command")
                command = read_command(source)
                if command.code == CommandCode.POSTCOPY_ADVISE and command.data:
                    self._postcopy_advised = True
                yield command
            elif kind == SectionType.START:
                yield from self._ram_start()
            elif kind in (SectionType.PART, SectionType.END):
                yield from self._ram_part()
            elif kind == SectionType.FULL:
                section = read_early_section(
                    source,
                    limit_bytes=self._device_limit_bytes,
                    footer=self._footers is not False,
                )
                if section is None:
                    break
                if early_sections == _EARLY_LIMIT:
                    raise DataError(
                        f"the stream has more than {_EARLY_LIMIT} early sections",
                        offset_bytes=start,
                    )
                early_sections += 1
                yield Device(section)
            elif kind == SectionType.EOF:
                break
            elif kind is None:
                raise DataError(
                    "the stream is truncated", why="it ends without EOF", offset_bytes=start
                )
            else:
                raise DataError(f"unknown section type 0x{kind:02x}", offset_bytes=start)
        yield from self._tail()

    def _ram_start(self) -> Iterator[Event]:
        source = self._source
        start = source.offset
        source.take(1, "a section's header")
        section_id = source.u32("a section's header")
        idstr = source.name("a section's name")
        instance_id = source.u32("a section's header")
        version_id = source.u32("a section's header")
        if idstr != RAM_IDSTR:
            raise DataError(
                f"the stream has a section '{idstr}' in several parts",
                why="only RAM may be in parts, not block migration, dirty bitmaps or VFIO",
                offset_bytes=start,
            )
        if (instance_id, version_id) != (RAM_INSTANCE_ID, RAM_VERSION) or section_id == 0:
            raise DataError(
                "the RAM section has an unknown form",
                why=f"id {section_id}, instance {instance_id}, version {version_id}",
                offset_bytes=start,
            )
        if self._ram is not None:
            raise DataError("the RAM section starts twice", offset_bytes=start)
        capabilities = self._configuration.capabilities if self._configuration else ()
        if self._postcopy_advised and CAPABILITY_IGNORE_SHARED in capabilities:
            raise DataError(
                "the stream claims postcopy and x-ignore-shared, which no QEMU does together",
                offset_bytes=start,
            )
        self._ram_id = section_id
        self._ram = RamReader(source, page_bytes=self.page_bytes, page_lookup=self._page_lookup)
        yield from self._ram.read_block_list(
            addresses=CAPABILITY_IGNORE_SHARED in capabilities,
            page_sizes=self._postcopy_advised,
            mapped=CAPABILITY_MAPPED_RAM in capabilities,
        )
        yield from self._ram.read_records()
        self._footer()

    def _ram_part(self) -> Iterator[Event]:
        source = self._source
        start = source.offset
        source.take(1, "a section's header")
        section_id = source.u32("a section's header")
        if self._ram is None or section_id != self._ram_id:
            raise DataError(
                f"a part of section {section_id} comes without its start", offset_bytes=start
            )
        yield from self._ram.read_records()
        self._footer()

    def _footer(self) -> None:
        """Read a RAM section's footer. All sections have one or none has; the first RAM section
        decides."""
        source = self._source
        has_footer = source.peek() == SectionType.FOOTER
        if self._footers is None:
            self._footers = has_footer
        if not self._footers:
            return
        start = source.offset
        if not has_footer:
            raise DataError("a RAM section has no footer", offset_bytes=start)
        source.take(1, "a section's footer")
        section_id = source.u32("a section's footer")
        if section_id != self._ram_id:
            raise DataError(
                f"a RAM section's footer has id {section_id} and not {self._ram_id}",
                offset_bytes=start,
            )

    def _tail(self) -> Iterator[Event]:
        """Read everything from the first device section after RAM to the end of the stream."""
        if self._ram is not None:
            self._ram.check_complete()
        source = self._source
        start = source.offset
        tail = source.rest(self._device_limit_bytes + DESCRIPTION_LIMIT_BYTES, "the device state")
        eof, text = split_description(tail, tail_offset=start)
        if eof > self._device_limit_bytes:
            raise DataError(
                f"the device state is larger than {self._device_limit_bytes} bytes",
                remedy="raise the reader's limit if the VM really has this much",
                offset_bytes=start,
            )
        sizes = spans = None
        if text is not None:
            sizes = described_sizes(text, text_offset=source.offset - len(text))
        if sizes is not None:
            spans = follow_sizes(tail, eof, sizes, footers=self._footers)
        sizes_agree = None if sizes is None else spans is not None
        if spans is None and eof == 0:
            spans = ()
        if spans is None:
            spans = cut_sections(
                tail,
                0,
                eof=eof,
                essential=is_essential,
                footers=self._footers,
                data_offset=start,
            )
        for span in spans:
            yield Device(section_from_span(tail, span))
        yield Eof()
        if text is not None:
            yield Description(text=text, sizes_agree=sizes_agree)
