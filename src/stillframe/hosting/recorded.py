"""What a snapshot file knows of the board that it was taken of."""

from __future__ import annotations

import os
from contextlib import closing
from pathlib import Path

import msgspec

from stillframe.errors import DataError
from stillframe.machine.board.board_command import PROGRAM_WORDS, BoardCommand, parse_options
from stillframe.restore.board_plan import saved_hardware
from stillframe.store.backends.local_source import LocalSource
from stillframe.store.skeleton import machine_type_of
from stillframe.store.snapshot import Snapshot
from stillframe.vmstate.board_cpu import BOARD_MACHINE_PREFIX

_STREAM_MAGIC = b"QEVM"


def recorded_board(path: str) -> BoardCommand | None:
    """The board of a snapshot: its hardware, its guest and name, not its files and sockets.
    Of an imported stream, its hardware only.

    None for what is no snapshot file of ours: a plain stream, a pipe.

    Raises:
        DataError: the snapshot is damaged, or it is of another kind of VM.
        HostError: it may not be read.
    """
    if not os.path.isfile(path):  # noqa: PTH113 - Path.is_file raises where it may not look
        return None
    with closing(LocalSource(path)) as source:
        if source.size_bytes >= len(_STREAM_MAGIC) and (
            source.read_at(0, len(_STREAM_MAGIC)) == _STREAM_MAGIC
        ):
            return None
    with Snapshot.open(path) as snapshot:
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
        ram_bytes=lengths.get("board.ram", board.ram_bytes),
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
