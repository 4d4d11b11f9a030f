"""The restore plan of a board: the recorded ``stillframe board run``, with files of its own.

The program is always this very Stillframe, never one that the snapshot names. The guest is in the
snapshot's RAM; its ELF file, if still there, serves only a reset.
"""

from __future__ import annotations

import os
import struct
import sys
from contextlib import closing
from pathlib import Path

import msgspec

from stillframe.board.board_command import (
    PROGRAM_WORDS,
    BoardCommand,
    ParsedCommand,
    parse_options,
)
from stillframe.board.hardware.framebuffer import FRAMEBUFFER
from stillframe.board.hardware.registers import REGISTERS
from stillframe.board.state.board_cpu import BOARD_MACHINE_PREFIX
from stillframe.errors import DataError, RefusedError, UsageError
from stillframe.model import MachineRecord
from stillframe.restore.ledger import Ledger, shown_option
from stillframe.restore.places import Places, choose_places
from stillframe.restore.plan_source import PlanSource
from stillframe.restore.planners import Planner, Wishes
from stillframe.restore.records import RestorePlan
from stillframe.still.skeleton import machine_type_of
from stillframe.store import open_snapshot
from stillframe.store.backends.local_source import LocalSource
from stillframe.vmstate.wire import STREAM_START

_RAM = "board.ram"
_GEOMETRY = struct.Struct(">II")
"""The payload of section ``framebuffer``."""
_DISK_REASON = "a private copy, so that the first board's disk is not written"
_NOT_HERE = {
    "--incoming": "the snapshot comes in",
    "--qmp": "say --qmp before the --",
    "--ram": "the snapshot tells how much RAM there is",
}


def plan_board(
    snapshot: PlanSource, record: MachineRecord, distrust: tuple[str, ...], wishes: Wishes
) -> RestorePlan:
    """Plan the restore of a board's snapshot; do not make, start or connect to anything.

    Args:
        record: the machine; its ``argv`` holds the words of ``stillframe board run``.

    Raises:
        UsageError: a bad socket path or directory, a program other than this one, or an option
            that is unknown or does not go with a restore. DataError: the recorded words are
            malformed. RefusedError: the caller wants the clock set to the instant.
    """
    if wishes.program is not None:
        raise UsageError(
            f"cannot use the program {wishes.program!r}",
            why="a board is run by this very Stillframe",
        )
    if wishes.clock != "host":
        raise RefusedError(
            "cannot set the clock back", why="a board has no RTC", remedy="leave --clock out",
            guest_state="none",
        )  # fmt: skip
    if record.argv[: len(PROGRAM_WORDS)] != PROGRAM_WORDS:
        raise DataError("the recorded command line is no 'stillframe board run'")
    recorded = parse_options(record.argv[len(PROGRAM_WORDS) :], error=DataError).board
    own = parse_options(wishes.extra_args, cwd=str(Path.cwd()))
    for option, why in _NOT_HERE.items():
        if option in own.given:
            raise UsageError(f"{option} does not go with a restore", why=why)
    lengths = {block.idstr: block.used_length_bytes for block in snapshot.blocks}
    name = own.board.name or record.name
    work = _Work(choose_places(name, wishes.directory, log_name="board.log"), recorded)
    board = work.board(own, lengths)
    if record.uid != os.geteuid():
        distrust += (f"its VM ran as user {record.uid}, and would run as you",)
    qmp = work.add_monitor(wishes.qmp_socket)
    stop = ("--paused",) if wishes.paused or own.paused else ()
    return work.plan(
        snapshot,
        # -P: do not run a directory that happens to be called stillframe.
        (sys.executable, "-P", "-m", *board.words(), "--qmp", qmp, *stop),
        vmm="board",
        vmm_name="the board",
        incoming_option="--incoming",
        environment=_own_environment(),
        name=board.name or record.name,
        recorded=record.argv,
        cwd="/",
        machine_type=record.machine_type,
        qmp_address=qmp,
        distrust=distrust,
    )


def imported_board(snapshot: PlanSource, machine_type: str, _wishes: Wishes) -> MachineRecord:
    """Return a record for a board's stream, which has no recorded command line.

    Raises:
        DataError: the stream does not hold a board.
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


def saved_hardware(snapshot: PlanSource) -> BoardCommand:
    """Return a board with the saved state's RAM, vCPUs and resolution; the rest is not in it.

    Raises:
        DataError: the snapshot does not hold a board.
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


def recorded_board(path: str) -> BoardCommand | None:
    """Return a snapshot's board: its hardware, guest and name, without its files and sockets.
    For an imported stream, return the hardware only.

    Return None if ``path`` is not a snapshot file of ours: a plain stream, a pipe.

    Raises:
        DataError: the snapshot is damaged, or of another kind of VM.
        HostError: it may not be read.
    """
    if not os.path.isfile(path):  # noqa: PTH113 - Path.is_file raises where it may not look
        return None
    with closing(LocalSource(path)) as source:
        if source.size_bytes >= len(STREAM_START) and (
            source.read_at(0, len(STREAM_START)) == STREAM_START
        ):
            return None
    with open_snapshot(path) as snapshot:
        record = snapshot.manifest.machine
        lengths = {block.idstr: block.used_length_bytes for block in snapshot.blocks}
        if record is None:
            machine_type = machine_type_of(snapshot.skeleton())
            if machine_type.startswith(BOARD_MACHINE_PREFIX):
                return saved_hardware(snapshot)
            raise _of_another(path, machine_type)
    if record.vmm != "board" or record.argv[: len(PROGRAM_WORDS)] != PROGRAM_WORDS:
        raise _of_another(path, record.machine_type)
    board = parse_options(record.argv[len(PROGRAM_WORDS) :], error=DataError).board
    guest = board.guest
    if guest is not None and guest.startswith("/") and not Path(guest).is_file():
        guest = None  # needed for a reset only
    return msgspec.structs.replace(
        BoardCommand(),
        guest=guest,
        ram_bytes=lengths.get(_RAM, board.ram_bytes),
        vcpus=board.vcpus,
        name=board.name,
        resolution=board.resolution,
        append=board.append,
    )


def _of_another(path: str, machine_type: str) -> DataError:
    return DataError(
        f"{path} is no snapshot of a board, but of a machine {machine_type or 'without a type'}",
        remedy="start it with 'stillframe restore'",
    )


def _own_environment() -> dict[str, str]:
    """Return variables that make ``python -m stillframe`` run this very Stillframe anywhere."""
    own = str(Path(__file__).parents[2])
    given = os.environ.get("PYTHONPATH", "").split(os.pathsep)
    paths = [own, *(str(Path(path).absolute()) for path in given if path)]
    return {"PYTHONPATH": os.pathsep.join(dict.fromkeys(paths))}


class _Work(Ledger):
    """The new board under construction."""

    def __init__(self, places: Places, recorded: BoardCommand) -> None:
        super().__init__(places)
        self._recorded = recorded

    def board(self, own: ParsedCommand, lengths: dict[str, int]) -> BoardCommand:
        """Return the board to start.

        Args:
            own: the caller's words, which take precedence. lengths: the snapshot's blocks', bytes.
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

    def _note_rewrite(self, option: str, before: object, after: object, reason: str) -> None:
        if before != after:
            self.rewrite(shown_option(option, before), shown_option(option, after), reason)

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
            after, reason = f"unix:{self.private_socket('serial', '--serial')}", "a private socket"
        else:
            after = self.private_file("serial", "--serial")
            reason = "the first board writes that file"
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
        after = self.private_file("display", "--display", ".png")
        self._note_rewrite("--display", before, after, "the first board writes that file")
        return after

    def _disk(self, own: ParsedCommand) -> str | None:
        before = self._recorded.disk
        if "--disk" in own.given:
            self._note_rewrite("--disk", before, own.board.disk, "your own")
            return own.board.disk
        if before is None:
            return None
        self.touch("file", "read", before, "--disk", required=True)
        copy = self.replace_disk(
            before, "raw", files=(before,), kind="copy", option="--disk"
        ).overlay
        self._note_rewrite("--disk", before, copy, _DISK_REASON)
        return copy


PLANNER = Planner(
    vmm="board", plan=plan_board, imported=imported_board, machine_prefix=BOARD_MACHINE_PREFIX
)
