"""What a snapshot file knows of the board that it was taken of."""

from __future__ import annotations

from pathlib import Path

import msgspec

from stillframe.errors import DataError
from stillframe.machine.board.board_command import PROGRAM_WORDS, BoardCommand, parse_options
from stillframe.store.snapshot import Snapshot

_STREAM_MAGIC = b"QEVM"


def recorded_board(path: str) -> BoardCommand | None:
    """The board of a snapshot: its hardware, its guest and name, not its files and sockets.

    None for what is no snapshot file of ours, or one that was imported: a plain stream, a pipe.

    Raises:
        DataError: the snapshot is damaged, or it is of another kind of VM.
    """
    file = Path(path)
    if not file.is_file():
        return None
    with file.open("rb") as start:
        if start.read(len(_STREAM_MAGIC)) == _STREAM_MAGIC:
            return None
    with Snapshot.open(path) as snapshot:
        record = snapshot.manifest.machine
        lengths = {block.idstr: block.used_length_bytes for block in snapshot.blocks}
    if record is None:
        return None
    if record.vmm != "board" or record.argv[: len(PROGRAM_WORDS)] != PROGRAM_WORDS:
        raise DataError(
            f"{path} is no snapshot of a board, but of a machine {record.machine_type}",
            remedy="start it with 'stillframe restore'",
        )
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
