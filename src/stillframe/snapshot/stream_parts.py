"""What surrounds the RAM pages in a snapshot's stream: its head and its tail."""

from __future__ import annotations

from collections.abc import Sequence

from stillframe.model import BlockRecord, RamBlock
from stillframe.vmstate import writer as stream
from stillframe.vmstate.devices import (
    DeviceSection,
    describe,
    is_early,
    split_device_state,
    with_run_state,
)

TARGET_PAGE_BYTES = 4096


class StreamParts:
    """Head and tail around the RAM sections.

    Args:
        device_state: what the machine's ``save_device_state`` gave.
        run_state: the state in which the restored machine is to be, such as ``running``.
    """

    def __init__(
        self,
        blocks: Sequence[RamBlock],
        device_state: bytes,
        *,
        machine_type: str,
        run_state: str,
    ) -> None:
        self._sections = tuple(
            with_run_state(section, run_state) if section.idstr == "globalstate" else section
            for section in split_device_state(device_state)
        )
        self._blocks = tuple((block.idstr, block.used_length_bytes) for block in blocks)
        self._machine_type = machine_type
        self.section_id = stream.choose_ram_section_id(self._sections)

    @property
    def sections(self) -> tuple[DeviceSection, ...]:
        return self._sections

    def head(self) -> bytes:
        """Everything up to the first RAM page; early device sections come after RAM's START."""
        return b"".join(
            (
                stream.stream_header(),
                stream.configuration_section(self._machine_type),
                stream.ram_start_section(self._blocks, section_id=self.section_id),
                *(section.raw for section in self._sections if is_early(section)),
            )
        )

    def tail(self) -> bytes:
        """Everything after the last RAM page."""
        return b"".join(
            (
                stream.ram_end_section(self.section_id),
                *(section.raw for section in self._sections if not is_early(section)),
                stream.eof(),
                stream.vmdescription(describe(self._sections, target_page_bytes=TARGET_PAGE_BYTES)),
            )
        )


def block_records(blocks: Sequence[RamBlock]) -> tuple[BlockRecord, ...]:
    """The blocks as the manifest keeps them."""
    return tuple(
        BlockRecord(
            idstr=block.idstr,
            used_length_bytes=block.used_length_bytes,
            page_size_bytes=block.page_size_bytes,
        )
        for block in blocks
    )
