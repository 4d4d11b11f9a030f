"""The loader of a machine from a stream, through its registered handlers.

Source: QEMU ``migration/savevm.c``: ``qemu_loadvm_state``, ``qemu_loadvm_state_main``,
``qemu_loadvm_section_start_full``, ``qemu_loadvm_section_part_end``, ``loadvm_process_command``.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TypeAlias

from stillframe.board.state.handlers import Entry, SaveStateRegistry
from stillframe.errors import DataError
from stillframe.vmstate.commands import read_command, take_command
from stillframe.vmstate.configuration import read_configuration
from stillframe.vmstate.description import DESCRIPTION_LIMIT_BYTES
from stillframe.vmstate.source import StreamSource
from stillframe.vmstate.stream_header import read_stream_header
from stillframe.vmstate.wire import SectionType

OnCommand: TypeAlias = Callable[[int, bytes, StreamSource], bool | None]
"""Takes a command's code and data, and the source positioned right after it. True ends the loop
that read it; a command with a packaged stream returns what ``load_sections`` returned for that."""

_SKIP_BYTES = 1 << 16


class StateLoader:
    """The loader of one stream, including all streams packaged in it.

    After an error, the machine is half loaded and must not run.

    Args:
        registry: the handlers; each loads at most once.
        machine_type: the name that the stream's configuration must have.
        on_command: handles commands; without it, commands that only inform are skipped, and others
            refused (``vmstate.commands.read_command``).
        target_page_bytes: the machine's page size.
    """

    def __init__(
        self,
        registry: SaveStateRegistry,
        *,
        machine_type: str,
        on_command: OnCommand | None = None,
        target_page_bytes: int = 4096,
    ) -> None:
        self._registry = registry
        self._machine_type = machine_type
        self._on_command = on_command
        self._target_page_bytes = target_page_bytes
        self._started: dict[int, Entry] = {}
        self._versions: dict[int, int] = {}
        self._loaded: set[int] = set()

    def load(self, source: StreamSource) -> bool:
        """Load a whole stream: header, configuration, sections, EOF, and a vmdescription if any.

        Returns:
            Whether a command ended the load before EOF: the stream goes on.

        Raises:
            DataError: the stream is damaged, truncated, or of another machine.
        """
        read_stream_header(source)
        self._configuration(source)
        if self.load_sections(source):
            return True
        self._skip_description(source)
        return False

    def load_sections(self, source: StreamSource) -> bool:
        """Load sections and commands up to EOF, or to a command that ends the loop.

        Returns:
            Whether a command ended it.

        Raises:
            DataError: the stream is damaged, truncated, or of another machine.
        """
        while True:
            start = source.offset
            kind = source.u8("a section's header")
            if kind == SectionType.EOF:
                return False
            if kind == SectionType.COMMAND:
                if self._command(source):
                    return True
            elif kind in (SectionType.START, SectionType.FULL):
                self._start_or_full(source, SectionType(kind), start)
            elif kind in (SectionType.PART, SectionType.END):
                self._part_or_end(source, start)
            else:
                raise DataError(f"unknown section type 0x{kind:02x}", offset_bytes=start)

    def _configuration(self, source: StreamSource) -> None:
        start = source.offset
        if source.peek() != SectionType.CONFIGURATION:
            raise DataError("the stream has no configuration section", offset_bytes=start)
        source.take(1, "the configuration section")
        configuration = read_configuration(source)
        if configuration.name != self._machine_type:
            raise DataError(
                f"the stream is of a machine '{configuration.name}', this one is a "
                f"'{self._machine_type}'",
                offset_bytes=start,
            )
        if configuration.capabilities:
            raise DataError(
                f"the stream depends on capability '{configuration.capabilities[0]}', "
                "which this machine does not have",
                offset_bytes=start,
            )
        bits = configuration.target_page_bits
        if bits is not None and 1 << bits != self._target_page_bytes:
            raise DataError(
                f"the stream has pages of {1 << bits} bytes, this machine of "
                f"{self._target_page_bytes}",
                offset_bytes=start,
            )

    def _command(self, source: StreamSource) -> bool:
        if self._on_command is None:
            read_command(source)
            return False
        command = take_command(source)
        return bool(self._on_command(command.code, command.data, source))

    def _start_or_full(self, source: StreamSource, kind: SectionType, start: int) -> None:
        section_id = source.u32("a section's header")
        idstr = source.name("a section's name")
        instance_id = source.u32("a section's header")
        version_id = source.u32("a section's header")
        entry = self._registry.find(idstr, instance_id)
        if entry is None:
            raise DataError(
                f"unknown section '{idstr}', instance {instance_id}",
                remedy="start the machine with the devices that the saved one had",
                offset_bytes=start,
            )
        if version_id > entry.version_id:
            raise DataError(
                f"section '{idstr}' has version {version_id}, this machine knows up to "
                f"{entry.version_id}",
                offset_bytes=start,
            )
        if entry.handler.iterable != (kind == SectionType.START):
            raise DataError(f"section '{idstr}' came as {kind.name}", offset_bytes=start)
        if entry.section_id in self._loaded or section_id in self._started:
            raise DataError(
                f"section '{idstr}', instance {instance_id}, id {section_id}, comes twice",
                offset_bytes=start,
            )
        self._loaded.add(entry.section_id)
        if kind == SectionType.START:
            self._started[section_id] = entry
            self._versions[section_id] = version_id
        entry.handler.load(source, version_id)
        _footer(source, section_id, idstr)

    def _part_or_end(self, source: StreamSource, start: int) -> None:
        section_id = source.u32("a section's header")
        entry = self._started.get(section_id)
        if entry is None:
            raise DataError(
                f"a part of section {section_id} comes without its start", offset_bytes=start
            )
        entry.handler.load(source, self._versions[section_id])
        _footer(source, section_id, entry.idstr)

    def _skip_description(self, source: StreamSource) -> None:
        if source.peek() != SectionType.VMDESCRIPTION:
            return
        start = source.offset
        source.take(1, "the vmdescription")
        left_bytes = source.u32("the vmdescription")
        if left_bytes > DESCRIPTION_LIMIT_BYTES:
            raise DataError(f"the vmdescription has {left_bytes} bytes", offset_bytes=start)
        while left_bytes:
            part_bytes = min(left_bytes, _SKIP_BYTES)
            source.take(part_bytes, "the vmdescription")
            left_bytes -= part_bytes


def _footer(source: StreamSource, section_id: int, idstr: str) -> None:
    start = source.offset
    what = f"the footer of section '{idstr}'"
    kind = source.u8(what)
    if kind != SectionType.FOOTER:
        raise DataError(
            f"section '{idstr}' does not end where its state does",
            why=f"found 0x{kind:02x} in place of its footer",
            offset_bytes=start,
        )
    footer_id = source.u32(what)
    if footer_id != section_id:
        raise DataError(
            f"the footer of section '{idstr}' has id {footer_id} and not {section_id}",
            offset_bytes=start,
        )
