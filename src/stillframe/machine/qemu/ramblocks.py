"""The RAM blocks of a running QEMU: names, lengths, host addresses, and the mappings under them.

There are three sources; the first that agrees with the monitor's ``info ramblock`` counts:

1. ``ram_list`` in QEMU's memory (``ram_list``), compared field by field;
2. the host addresses that ``info ramblock`` prints from QEMU 8.0 on;
3. the mappings' shape, anchored by ``gpa2hva`` (``ramblock_search``), for older builds.

A wrong block would make a wrong snapshot, so if none agrees the VM is refused.
"""

from __future__ import annotations

import contextlib
import time

from stillframe.errors import RefusedError
from stillframe.machine.process.ram_mappings import PlacedBlock, Signature, mapped_blocks
from stillframe.machine.process.ramblock_text import MonitorBlock, parse_info_ramblock
from stillframe.machine.qemu.ram_list import (
    HEAD_OFFSETS,
    RAM_MIGRATABLE,
    ListedBlock,
    RamList,
    RamListError,
)
from stillframe.machine.qemu.ramblock_search import search_blocks
from stillframe.model import RamBlock
from stillframe.qmp.client import QmpClient

_TRIES = 5
_PAUSE_S = 0.01


class QemuRamTable:
    """A reader of one VM's RAM blocks, as often as wanted. The guest is not touched."""

    def __init__(self, pid: int, qmp: QmpClient) -> None:
        """Prepare to read.

        Raises:
            HostError: we may not read ``/proc/PID/mem``.
            MachineError: the process is gone.
        """
        self._pid = pid
        self._qmp = qmp
        self._list: RamList | None = None
        self._head_offset: int | None = None
        self._why_no_list = ""
        try:
            self._list = RamList(pid)
        except RamListError as error:
            self._why_no_list = str(error)

    def close(self) -> None:
        """Close descriptors."""
        if self._list is not None:
            self._list.close()

    def listed(self) -> list[tuple[ListedBlock, int]]:
        """Return the migratable blocks with their page sizes in bytes, in QEMU's order.

        Raises:
            RefusedError: the blocks cannot be determined for certain.
            MachineError: the monitor went away.
        """
        for attempt in range(_TRIES):
            if attempt:
                time.sleep(_PAUSE_S)
            monitor = parse_info_ramblock(self._qmp.hmp("info ramblock"))
            blocks = self._agreed(monitor)
            if blocks is not None:
                return [
                    (block, line.page_size_bytes)
                    for block, line in zip(blocks, monitor, strict=True)
                    if block.idstr and block.flags & RAM_MIGRATABLE
                ]
        raise RefusedError(
            "cannot find the VM's RAM blocks",
            why=f"QEMU's list and its monitor do not agree ({self._why_no_list or 'they differ'})",
            remedy="use a QEMU from 8.0 on, or one that exports its symbols (built with modules)",
        )

    def _agreed(self, monitor: list[MonitorBlock]) -> list[ListedBlock] | None:
        if self._list is not None:
            for head_offset in HEAD_OFFSETS:
                with contextlib.suppress(RamListError):
                    walk = self._list.walk(head_offset)
                    if _same(walk, monitor):
                        self._head_offset = head_offset
                        return walk
        if monitor and all(line.hva for line in monitor):
            return [_listed(line, line.hva or 0) for line in monitor]
        if monitor and self._list is None:
            addresses = search_blocks(self._pid, self._qmp, monitor)
            return [_listed(line, hva) for line, hva in zip(monitor, addresses, strict=True)]
        return None

    def read(self) -> list[RamBlock]:
        """Return the migratable blocks, in QEMU's order, with page size and the mapping under each.

        Raises:
            RefusedError: as ``listed``; or a block is not mapped as it should be.
            MachineError, HostError: as ``mapped_blocks``.
        """
        return mapped_blocks(
            self._pid,
            [
                PlacedBlock(
                    idstr=block.idstr,
                    hva=block.hva,
                    used_length_bytes=block.used_length_bytes,
                    max_length_bytes=block.max_length_bytes,
                    page_size_bytes=page_size_bytes,
                )
                for block, page_size_bytes in self.listed()
            ],
        )

    def signature(self) -> Signature:
        """Return what must not change during a snapshot: cheap to read, and to compare.

        It comes from QEMU's memory if the list was found there (well under a millisecond, without
        the monitor), else from the monitor.

        Raises:
            RefusedError: as ``listed``. MachineError: the monitor went away.
        """
        if self._list is not None and self._head_offset is None:
            self.listed()  # take all signatures from the same source
        if self._list is not None and self._head_offset is not None:
            for _ in range(_TRIES):
                with contextlib.suppress(RamListError):
                    return tuple(
                        (b.idstr, b.hva, b.used_length_bytes, b.max_length_bytes)
                        for b in self._list.walk(self._head_offset)
                    )
                time.sleep(_PAUSE_S)
        lines = parse_info_ramblock(self._qmp.hmp("info ramblock"))
        return tuple(
            (b.name, b.hva or b.ram_addr, b.used_length_bytes, b.max_length_bytes) for b in lines
        )


def read_ram_blocks(pid: int, qmp: QmpClient) -> list[RamBlock]:
    """Return the migratable RAM blocks of a VM, once; ``QemuRamTable`` reads them repeatedly.

    Raises:
        RefusedError, HostError, MachineError: as ``QemuRamTable``.
    """
    table = QemuRamTable(pid, qmp)
    try:
        return table.read()
    finally:
        table.close()


def _listed(line: MonitorBlock, hva: int) -> ListedBlock:
    # Only a registered block has a name, and registering makes it migratable
    # (migration/savevm.c: vmstate_register_ram).
    return ListedBlock(
        idstr=line.name,
        hva=hva,
        ram_addr=line.ram_addr,
        used_length_bytes=line.used_length_bytes,
        max_length_bytes=line.max_length_bytes,
        flags=RAM_MIGRATABLE if line.name else 0,
    )


def _same(walk: list[ListedBlock], monitor: list[MonitorBlock]) -> bool:
    return len(walk) == len(monitor) and all(
        block.idstr == line.name
        and block.ram_addr == line.ram_addr
        and block.used_length_bytes == line.used_length_bytes
        and block.max_length_bytes == line.max_length_bytes
        and line.hva in (None, block.hva)
        for block, line in zip(walk, monitor, strict=True)
    )
