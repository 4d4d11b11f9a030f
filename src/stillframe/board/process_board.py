"""A running board in another process as a machine."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import ClassVar

import msgspec

from stillframe.board.board_command import (
    PROGRAM_WORDS,
    BoardCommand,
    parse_options,
    words_of_process,
)
from stillframe.board.nameplate import Nameplate, read_nameplates
from stillframe.errors import RefusedError, UsageError
from stillframe.machine import Blocker, Mode, Moment
from stillframe.machine.process.inspection import gather
from stillframe.machine.process.machine import ProcessMachine
from stillframe.machine.process.preflight import CHECKS, blockers
from stillframe.machine.process.ram_mappings import PlacedBlock, Signature, mapped_blocks
from stillframe.machine.process.ramblock_text import MonitorBlock, parse_info_ramblock
from stillframe.machine.process.vm_info import (
    ProcessFacts,
    VmInfo,
    process_facts,
    reachable_path,
)
from stillframe.model import MachineRecord, RamBlock
from stillframe.qmp.client import QmpClient

ACCELERATOR = "unicorn"


class ProcessBoard(ProcessMachine):
    """A connection to one board: its monitor and its process. Made by ``finding.connect``."""

    user_mode_only_ok: ClassVar[bool] = True
    without_userfaultfd: ClassVar[str | None] = (
        "let the board take it itself: 'migrate' with the capability background-snapshot over QMP"
    )

    def __init__(self, info: VmInfo, qmp: QmpClient) -> None:
        """Prepare the connection without touching the guest.

        Raises:
            MachineError: the process is gone.
        """
        super().__init__(info, qmp, BoardRamTable(info.pid, qmp))

    def accelerator(self) -> str:
        """Return ``unicorn``, which runs every board."""
        return ACCELERATOR

    def describe(self) -> MachineRecord:
        """Describe the board; ``argv`` is the command that starts such a board."""
        return msgspec.structs.replace(super().describe(), cwd="/")

    def preflight(self, mode: Mode = "background", moment: Moment = "first") -> list[Blocker]:
        """Return everything that blocks a snapshot now. Does not touch the guest.

        Raises:
            MachineError: the monitor or the process went away. HostError: not permitted.
        """
        blocks = self.ram_blocks() if moment != "stop" else ()
        return blockers(gather(self.info, self.qmp, blocks, mode), CHECKS[moment])


class BoardRamTable:
    """A board's RAM blocks, read anew on each call. Reading does not touch the guest."""

    def __init__(self, pid: int, qmp: QmpClient) -> None:
        self._pid = pid
        self._qmp = qmp

    def _listed(self) -> list[MonitorBlock]:
        reply = self._qmp.execute("x-query-ramblock")
        text = reply.get("human-readable-text") if isinstance(reply, Mapping) else None
        blocks = parse_info_ramblock(text) if isinstance(text, str) else []
        if not blocks or not all(block.hva and block.name for block in blocks):
            raise RefusedError(
                "cannot find the board's RAM blocks",
                why="its monitor does not tell where they are",
                remedy="report it, with the board's version",
            )
        return blocks

    def read(self) -> list[RamBlock]:
        """Return all blocks in the board's order, with their backing as ``/proc`` shows it.

        Raises:
            RefusedError: the monitor does not list them, or they are not mapped as listed.
            MachineError, HostError: the monitor or ``/proc`` is out of reach.
        """
        return mapped_blocks(
            self._pid,
            [
                PlacedBlock(
                    idstr=block.name,
                    hva=block.hva or 0,
                    used_length_bytes=block.used_length_bytes,
                    max_length_bytes=block.max_length_bytes,
                    page_size_bytes=block.page_size_bytes,
                )
                for block in self._listed()
            ],
        )

    def signature(self) -> Signature:
        """Return what must not change while a snapshot is taken.

        Raises:
            MachineError: the monitor went away. RefusedError: it does not list the blocks.
        """
        return tuple(
            (block.name, block.hva or 0, block.used_length_bytes, block.max_length_bytes)
            for block in self._listed()
        )

    def close(self) -> None:
        """Do nothing: it holds nothing."""


def read_boards(pid: int) -> list[VmInfo]:
    """Return the boards of a process: usually none, and one for ``stillframe board run``.

    For another user's process, which this one may not inspect, read its command line instead.
    """
    process = process_facts(pid)
    if process is None:
        return []
    try:
        plates = read_nameplates(process.directory)
    except PermissionError:
        words = words_of_process(process.argv)
        return [_by_words(pid, process, words)] if words is not None else []
    return [_by_plate(pid, process, plate) for plate in plates]


def _by_plate(pid: int, process: ProcessFacts, plate: Nameplate) -> VmInfo:
    path = reachable_path(process.directory, plate.qmp) if plate.qmp else None
    return _info(pid, process, plate.name, plate.command, plate.ram_bytes, path)


def _by_words(pid: int, process: ProcessFacts, words: Sequence[str]) -> VmInfo:
    try:
        parsed = parse_options(words)
        board, qmp = parsed.board, parsed.qmp
    except UsageError:
        board, qmp = BoardCommand(), None
    if not any(qmp and word.endswith(qmp) for word in words):
        qmp = None  # relative to a working directory that we may not read
    return _info(pid, process, board.name, (*PROGRAM_WORDS, *words), board.ram_bytes, qmp)


def _info(
    pid: int,
    process: ProcessFacts,
    name: str,
    command: tuple[str, ...],
    ram_bytes: int,
    qmp: str | None,
) -> VmInfo:
    return VmInfo(
        pid=pid,
        started_s=process.started_s,
        uid=process.uid,
        name=name,
        executable=process.executable,
        argv=command,
        accelerator=ACCELERATOR,
        ram_bytes=ram_bytes,
        qmp_addresses=(qmp,) if qmp else (),
        vmm="board",
    )


class BoardKind:
    """The board's ``machine.finding.MachineKind``."""

    vmm = "board"
    read = staticmethod(read_boards)
    connect = ProcessBoard


KIND = BoardKind()
