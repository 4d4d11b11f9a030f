"""The head and the tail around the RAM pages in a snapshot's stream."""

from __future__ import annotations

import re
from collections.abc import Sequence
from itertools import pairwise

from stillframe.model import TARGET_PAGE_BYTES, BlockRecord, RamBlock
from stillframe.vmstate import writer as stream
from stillframe.vmstate.devices import (
    GLOBAL_STATE_IDSTR,
    DeviceSection,
    describe,
    find_section,
    is_early,
    make_global_state,
    split_description,
    split_device_state,
    with_run_state,
)

_LOADABLE = {"debug": "paused"}
"""Run states that QEMU cannot load, with a substitute: loading ``debug`` makes it abort (QEMU
``system/runstate.c``)."""

_WITHOUT_CONFIGURATION = re.compile(r"-([01]\.\d+|2\.[0-3])$")
"""Machine types up to 2.3 (QEMU ``hw/core/machine.c``, ``hw_compat_2_3``)."""
_GLOBAL = re.compile(
    r"(?:migration\.|driver=migration,property=)send-configuration(?:=|,value=)(\w+)"
)


class StreamFraming:
    """The head and the tail around the RAM sections.

    Args:
        device_state: the result of the machine's ``save_device_state``; empty if not saved.
        run_state: the run state of the restored machine, such as ``running``.
        argv: the machine's command line, which can change the stream's format.

    ``footers``: whether sections have footers.
    """

    def __init__(
        self,
        blocks: Sequence[RamBlock],
        device_state: bytes,
        *,
        machine_type: str,
        run_state: str,
        argv: Sequence[str] = (),
    ) -> None:
        sections: tuple[DeviceSection, ...] = ()
        self._description = b""
        if device_state:
            device_state, self._description = split_description(device_state)
            sections = split_device_state(device_state)
        self.footers = all(section.has_footer for section in sections)
        global_state = find_section(sections, GLOBAL_STATE_IDSTR)
        self._configured = sends_configuration(
            machine_type, argv, by_state=self.footers or global_state is not None
        )
        if device_state and global_state is None and run_state != "running":
            # QEMU loads this section even for machine types up to 2.3, which do not send it.
            section_id = stream.choose_section_id(sections)
            made = make_global_state(run_state, section_id=section_id, footer=self.footers)
            sections = (*sections, made)
        self._sections = tuple(
            with_run_state(section, _LOADABLE.get(run_state, run_state))
            if section is global_state
            else section
            for section in sections
        )
        self._blocks = tuple((block.idstr, block.used_length_bytes) for block in blocks)
        self._machine_type = machine_type
        self.section_id = stream.choose_section_id(self._sections)

    @property
    def sections(self) -> tuple[DeviceSection, ...]:
        return self._sections

    def head(self) -> bytes:
        """Return everything before the first RAM page; early device sections follow RAM's START."""
        return b"".join(
            (
                stream.stream_header(),
                stream.configuration_section(self._machine_type) if self._configured else b"",
                stream.ram_start_section(
                    self._blocks, section_id=self.section_id, footer=self.footers
                ),
                *(section.raw for section in self._sections if is_early(section)),
            )
        )

    def tail(self) -> bytes:
        """Return everything after the last RAM page."""
        return b"".join(
            (
                stream.ram_end_section(self.section_id, footer=self.footers),
                *(section.raw for section in self._sections if not is_early(section)),
                stream.eof(),
                self._description
                or stream.vmdescription(
                    describe(self._sections, target_page_bytes=TARGET_PAGE_BYTES)
                ),
            )
        )


def sends_configuration(machine_type: str, argv: Sequence[str], *, by_state: bool) -> bool:
    """Return whether the machine's streams have a configuration section; if so, its loader
    requires one.

    Args:
        by_state: whether the device state looks like that of a machine that sends one.
    """
    for option, value in reversed(list(pairwise(argv))):
        given = _GLOBAL.fullmatch(value)
        if option.lstrip("-") == "global" and given is not None:
            return given[1] in ("on", "yes", "true", "y")
    return by_state and _WITHOUT_CONFIGURATION.search(machine_type) is None


def block_records(blocks: Sequence[RamBlock]) -> tuple[BlockRecord, ...]:
    """Return the blocks' records for the manifest."""
    return tuple(
        BlockRecord(
            idstr=block.idstr,
            used_length_bytes=block.used_length_bytes,
            page_size_bytes=block.page_size_bytes,
        )
        for block in blocks
    )
