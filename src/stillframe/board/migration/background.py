"""The background snapshot of the board: a snapshot job that writes this board to a channel.

Source: QEMU ``migration/migration.c``: bg_migration_thread.
"""

from __future__ import annotations

from contextlib import ExitStack

from stillframe.board.local_board import LocalBoard
from stillframe.board.migration.outgoing import Outgoing
from stillframe.board.migration.outgoing_channel import OutgoingChannel
from stillframe.snapshot.options import SnapshotOptions
from stillframe.snapshot.output import StreamOutput
from stillframe.snapshot.take import take_into
from stillframe.still.frames import LEVEL_NONE


def save_in_background(task: Outgoing, channel: OutgoingChannel, cleanup: ExitStack) -> None:
    """Write the machine's state at one point in time while the guest runs on.

    Raises:
        StillframeError: it failed or was cancelled; the guest goes on, its RAM unprotected.
    """
    machine = LocalBoard(task.board, protection=task.protection)
    # One thread only writes: there is nothing to encode.
    options = SnapshotOptions(compression_level=LEVEL_NONE, workers=1)
    taken = take_into(task.control, machine, StreamOutput(channel), options)
    task.counters.follow(taken.statistics)
