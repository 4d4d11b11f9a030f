"""Plans the restore of a board: the recorded ``stillframe board run``, with places of its own.

The program is never the file's word: it is this very Stillframe. The guest is in the snapshot's
RAM; its ELF file, if it is still there, serves for a reset only.
"""

from __future__ import annotations

import os
import struct
import sys
from collections.abc import Sequence
from pathlib import Path

import msgspec

from stillframe.errors import DataError, UsageError
from stillframe.machine.board.board_command import (
    PROGRAM_WORDS,
    BoardCommand,
    ParsedCommand,
    parse_options,
)
from stillframe.machine.board.framebuffer import FRAMEBUFFER
from stillframe.machine.board.registers import REGISTERS
from stillframe.model import MachineRecord
from stillframe.restore.disk_use import is_written
from stillframe.restore.places import Places, check_socket_path, choose_places
from stillframe.restore.records import (
    Access,
    DiskOverlay,
    RestorePlan,
    Rewrite,
    Touch,
    TouchKind,
)
from stillframe.restore.show import shown_words
from stillframe.store.snapshot import Snapshot

_RAM = "board.ram"
_GEOMETRY = struct.Struct(">II")
"""The payload of ``framebuffer``."""
_DISKS_NOTE = "disks are as they are now, not as they were at the snapshot's instant"
_DISK_REASON = "a private copy, so that the first board's disk is not written"
_NOT_HERE = {
    "--incoming": "the snapshot comes in",
    "--qmp": "say --qmp before the --",
    "--ram": "the snapshot tells how much RAM there is",
}


def plan_board(
    snapshot: Snapshot,
    record: MachineRecord,
    *,
    distrust: str,
    qmp_socket: str | None,
    extra_args: Sequence[str],
    program: str | None,
    paused: bool,
    directory: Path | None,
) -> RestorePlan:
    """Say how the snapshot of a board would be started; nothing is made, started or connected to.

    Args:
        record: the machine; its ``argv`` is the words of ``stillframe board run``.
        distrust: why the file needs the caller's trust, or nothing.
        extra_args: the caller's own options of ``stillframe board run``, in place of recorded ones.
        The others are those of ``restore.plan.plan_restore``.

    Raises:
        UsageError: a bad socket path or directory, a program, or an option that is none or that
            does not go with a restore. DataError: the recorded words are malformed.
    """
    if program is not None:
        raise UsageError(
            f"cannot use the program {program!r}", why="a board is run by this very Stillframe"
        )
    if record.argv[: len(PROGRAM_WORDS)] != PROGRAM_WORDS:
        raise DataError("the recorded command line is no 'stillframe board run'")
    recorded = parse_options(record.argv[len(PROGRAM_WORDS) :], error=DataError).board
    own = parse_options(extra_args, cwd=str(Path.cwd()))
    for option, why in _NOT_HERE.items():
        if option in own.given:
            raise UsageError(f"{option} does not go with a restore", why=why)
    lengths = {block.idstr: block.used_length_bytes for block in snapshot.blocks}
    places = choose_places(own.board.name or record.name, directory, log_name="board.log")
    work = _Work(places, recorded)
    board = work.board(own, lengths)
    qmp = str(places.qmp if qmp_socket is None else Path(qmp_socket).absolute())
    check_socket_path(qmp, made_later=qmp_socket is None)
    work.touch("socket", "listen", qmp, "--qmp")
    work.touch("program", "run", sys.executable, "")
    work.touch("file", "create", str(places.log), "")
    stop = ("--paused",) if paused or own.paused else ()
    return RestorePlan(
        vmm="board",
        snapshot=snapshot.container.source.description,
        name=board.name or record.name,
        program=sys.executable,
        # -P: a directory that happens to be called stillframe is not run.
        argv=(sys.executable, "-P", "-m", *board.words(), "--qmp", qmp, *stop),
        recorded=record.argv,
        cwd="/",
        machine_type=record.machine_type,
        directory=str(places.run),
        disk_directory=str(places.disks),
        qmp_address=qmp,
        log_path=str(places.log),
        rewrites=tuple(work.rewrites),
        touches=tuple(work.touches),
        overlays=tuple(work.overlays),
        refusals=(),
        distrust=distrust,
        risks=(),
        notes=tuple(work.notes),
    )


def imported_board(snapshot: Snapshot, machine_type: str) -> MachineRecord:
    """A record for a stream of a board without a recorded command line.

    Raises:
        DataError: what it holds is no board.
    """
    command = saved_hardware(snapshot)
    return MachineRecord(
        name="board",
        pid=0,
        uid=os.geteuid(),
        vmm="board",
        vmm_version="",
        machine_type=machine_type,
        accelerator="unicorn",
        executable="",
        argv=msgspec.structs.replace(command, serial="none").words(),
        cwd="/",
        guest_state="",
        vcpus=command.vcpus,
    )


def saved_hardware(snapshot: Snapshot) -> BoardCommand:
    """A board of the RAM, vCPUs and resolution that the saved state is of; the rest is not in it.

    Raises:
        DataError: what it holds is no board.
    """
    lengths = {block.idstr: block.used_length_bytes for block in snapshot.blocks}
    devices = snapshot.skeleton().devices
    geometry = [section.payload for section in devices if section.idstr == FRAMEBUFFER.name]
    if _RAM not in lengths or [len(payload) for payload in geometry] != [_GEOMETRY.size]:
        raise DataError("the stream is of a board, and has not what a board has")
    return BoardCommand(
        ram_bytes=lengths[_RAM],
        vcpus=sum(section.idstr == REGISTERS.name for section in devices),
        resolution=_GEOMETRY.unpack(geometry[0]),
    )


class _Work:
    """The new board while it is being put together, and what is learnt on the way."""

    def __init__(self, places: Places, recorded: BoardCommand) -> None:
        self._places = places
        self._recorded = recorded
        self.rewrites: list[Rewrite] = []
        self.touches: list[Touch] = []
        self.overlays: list[DiskOverlay] = []
        self.notes: list[str] = []

    def board(self, own: ParsedCommand, lengths: dict[str, int]) -> BoardCommand:
        """The board to start.

        Args:
            own: the caller's own words, which win. lengths: of the snapshot's blocks.
        """
        recorded = self._recorded
        board = msgspec.structs.replace(
            recorded,
            ram_bytes=lengths.get(_RAM, recorded.ram_bytes),
            guest=self._guest(recorded.guest),
            serial=self._serial(own),
            display=self._display(own),
            disk=self._disk(own),
        )
        for field in ("guest", "name", "vcpus", "resolution", "append", "protection"):
            option = {"guest": "guest", "vcpus": "--cpus"}.get(field, f"--{field}")
            if option in own.given or (field == "guest" and own.board.guest is not None):
                value = getattr(own.board, field)
                self._note_rewrite(option, getattr(board, field), value, "your own")
                board = msgspec.structs.replace(board, **{field: value})
        return board

    def touch(
        self,
        kind: TouchKind,
        access: Access,
        target: str,
        option: str,
        *,
        required: bool = False,
    ) -> None:
        """Note that something of the host is used."""
        self.touches.append(
            Touch(kind=kind, access=access, target=target, option=option, required=required)
        )

    def _note_rewrite(self, option: str, before: object, after: object, reason: str) -> None:
        def shown(value: object) -> str:
            return "" if value is None else shown_words([option, str(value)])

        if before != after:
            self.rewrites.append(Rewrite(before=shown(before), after=shown(after), reason=reason))

    def _guest(self, guest: str | None) -> str | None:
        if guest is None or not guest.startswith("/"):
            return guest
        if not Path(guest).is_file():
            self.notes.append(f"{guest} is not there: a reset of the guest will fail")
            self._note_rewrite("guest", guest, None, "the file is not there")
            return None
        self.touch("file", "read", guest, "guest")
        return guest

    def _serial(self, own: ParsedCommand) -> str:
        if "--serial" in own.given:
            self._note_rewrite("--serial", self._recorded.serial, own.board.serial, "your own")
            return own.board.serial
        before = self._recorded.serial
        if before == "none":
            return before
        if before == "stdio" or before.startswith("unix:"):
            path = str(self._places.run / "serial.sock")
            check_socket_path(path, made_later=True)
            self.touch("socket", "listen", path, "--serial")
            after, reason = f"unix:{path}", "a private socket"
        else:
            after, reason = str(self._places.run / "serial.log"), "the first board writes that file"
            self.touch("file", "create", after, "--serial")
        self._note_rewrite("--serial", before, after, reason)
        return after

    def _display(self, own: ParsedCommand) -> str | None:
        before = self._recorded.display
        if "--display" in own.given:
            self._note_rewrite("--display", before, own.board.display, "your own")
            return own.board.display
        if before is None or before == "terminal":
            self._note_rewrite("--display", before, None, "it runs in the background")
            return None
        after = str(self._places.run / "display.png")
        self.touch("file", "create", after, "--display")
        self._note_rewrite("--display", before, after, "the first board writes that file")
        return after

    def _disk(self, own: ParsedCommand) -> str | None:
        before = self._recorded.disk
        if "--disk" in own.given:
            self._note_rewrite("--disk", before, own.board.disk, "your own")
            return own.board.disk
        if before is None:
            return None
        copy = str(self._places.disks / "disk0.raw")
        in_use = is_written(before)
        self.overlays.append(
            DiskOverlay(base=before, base_format="raw", overlay=copy, in_use=in_use, kind="copy")
        )
        self.touch("file", "read", before, "--disk", required=True)
        self.touch("file", "create", copy, "--disk")
        self._note_rewrite("--disk", before, copy, _DISK_REASON)
        self.notes.append(_DISKS_NOTE)
        if in_use:
            self.notes.append(
                f"{before} is being written by another program: the copy may hold a mixture"
            )
        return copy
