"""The QMP commands of a board but for those of migration (``migration/commands``).

They answer as QEMU's do; docs/reference/board-qmp.md lists them, and where they differ.
"""

from __future__ import annotations

from collections.abc import Callable

from stillframe.machine.board.board import Board
from stillframe.machine.board.commands_files import add_file_commands
from stillframe.machine.board.commands_hotplug import Hotplug, add_hotplug_commands
from stillframe.machine.board.commands_qom import add_qom_commands
from stillframe.machine.board.commands_query import add_query_commands
from stillframe.machine.board.commands_run import add_run_commands
from stillframe.machine.board.commands_text import add_text_commands
from stillframe.qmp.commands import CommandTable


def add_board_commands(
    commands: CommandTable, board: Board, *, migrating: Callable[[], bool] = lambda: False
) -> None:
    """Add them to a table, whose lock must be the board's.

    Args:
        migrating: whether the board is being saved or loaded, so that no RAM may come.
    """
    hotplug = Hotplug(board, migrating)
    add_run_commands(commands, board)
    add_query_commands(commands, board)
    add_hotplug_commands(commands, hotplug)
    add_qom_commands(commands, board, hotplug)
    add_file_commands(commands, board)
    add_text_commands(commands, board)
