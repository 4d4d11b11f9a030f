"""The QMP commands of a board, except those for migration (``board/migration/commands``).

They answer as QEMU does; docs/reference/board-qmp.md lists them and the differences.
"""

from __future__ import annotations

from collections.abc import Callable

from stillframe.board.hardware.board import Board
from stillframe.board.monitor.command_set import CommandTable
from stillframe.board.monitor.commands_files import add_file_commands
from stillframe.board.monitor.commands_hmp import add_hmp_commands
from stillframe.board.monitor.commands_hotplug import Hotplug, add_hotplug_commands
from stillframe.board.monitor.commands_machine import add_machine_commands
from stillframe.board.monitor.commands_qom import add_qom_commands


def add_board_commands(
    commands: CommandTable, board: Board, *, migrating: Callable[[], bool] = lambda: False
) -> None:
    """Add the commands to a table, whose lock must be the board's.

    Args:
        migrating: returns whether the board is being saved or loaded: no RAM may be added then.
    """
    hotplug = Hotplug(board, migrating)
    add_machine_commands(commands, board)
    add_hotplug_commands(commands, hotplug)
    add_qom_commands(commands, board, hotplug)
    add_file_commands(commands, board)
    add_hmp_commands(commands, board)
