"""QMP commands that change or tell the run state (QEMU ``qapi/run-state.json``, ``misc.json``).

The board sends the events that go with them.
"""

from __future__ import annotations

from stillframe.machine.board.board import Board
from stillframe.qmp.commands import CommandContext, CommandTable, NoArguments
from stillframe.qmp.errors import QmpError

_NEEDS_RESET = frozenset({"internal-error", "shutdown"})
"""QEMU ``system/runstate.c``: runstate_needs_reset."""


def add_run_commands(commands: CommandTable, board: Board) -> None:
    """Add query-status, stop, cont, system_reset, system_powerdown and quit."""

    def query_status(_context: CommandContext, _arguments: NoArguments) -> object:
        return {"status": board.run_state, "running": board.run_state == "running"}

    def stop(_context: CommandContext, _arguments: NoArguments) -> None:
        board.stop()

    def cont(_context: CommandContext, _arguments: NoArguments) -> None:
        if board.run_state in _NEEDS_RESET:
            raise QmpError("Resetting the Virtual Machine is required")
        board.cont()

    def system_reset(_context: CommandContext, _arguments: NoArguments) -> None:
        board.reset()

    def system_powerdown(_context: CommandContext, _arguments: NoArguments) -> None:
        board.powerdown()

    def quit_board(_context: CommandContext, _arguments: NoArguments) -> None:
        board.quit()

    commands.add("query-status", query_status)
    commands.add("stop", stop)
    commands.add("cont", cont)
    commands.add("system_reset", system_reset)
    commands.add("system_powerdown", system_powerdown)
    commands.add("quit", quit_board)
