"""What may be done to a board whose state is on its way, and what a stop means then."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from stillframe.errors import MachineError
from stillframe.machine.board.board import Board
from stillframe.machine.board.commands_run import add_run_commands
from stillframe.qmp.commands import CommandContext, CommandTable
from stillframe.qmp.descriptors import ClientDescriptors, FdSets
from tests.unit.board.tiny import Tiny

SPIN = "void _start(struct info *info, u64 cpu) { for (;;) results[cpu]++; }"
SEGMENTS_GPA = 0x100000


@pytest.fixture
def tiny() -> Iterator[Tiny]:
    with Tiny(SPIN) as tiny:
        yield tiny


def run(tiny: Tiny) -> None:
    tiny.board.power_on()
    tiny.until(lambda: all(tiny.results(1)))


def test_no_reset_while_a_stream_comes_in(tiny: Tiny) -> None:
    tiny.board.start_incoming()
    tiny.board.rams[0].write(SEGMENTS_GPA, b"has arrived")
    tiny.board.hardware.timer.interval_ns = 5
    with pytest.raises(MachineError, match="cannot be reset in run state 'inmigrate'"):
        tiny.board.reset()
    assert tiny.board.rams[0].read(SEGMENTS_GPA, 11) == b"has arrived"
    assert tiny.board.hardware.timer.interval_ns == 5
    assert tiny.told() == []


def test_no_reset_while_the_last_goes_out(tiny: Tiny) -> None:
    run(tiny)
    tiny.board.stop("finish-migrate")
    before = tiny.board.rams[0].read(0, tiny.board.config.ram_bytes)
    with pytest.raises(MachineError, match="cannot be reset in run state 'finish-migrate'"):
        tiny.board.reset()
    with pytest.raises(MachineError, match="cannot be given RAM"):
        tiny.board.plug_dimm(1 << 20)
    with pytest.raises(MachineError, match="Migration is not finalized yet"):
        tiny.board.cont()
    assert tiny.board.run_state == "finish-migrate"
    assert tiny.board.rams[0].read(0, len(before)) == before
    assert tiny.told() == ["RESUME", "STOP"]
    tiny.board.stop("postmigrate")
    tiny.board.reset()
    assert tiny.board.run_state == "prelaunch"


def test_a_failed_migration_goes_back(tiny: Tiny) -> None:
    run(tiny)
    tiny.board.stop("finish-migrate")
    tiny.board.return_from_sending()
    assert tiny.board.run_state == "running"
    tiny.board.stop("postmigrate")
    tiny.board.stop("finish-migrate")
    tiny.board.return_from_sending()
    assert tiny.board.run_state == "postmigrate", "the guest may run elsewhere"


def stop_by_command(board: Board) -> None:
    commands = CommandTable()
    add_run_commands(commands, board)
    commands.run("stop", CommandContext(ClientDescriptors(FdSets())), {})


def test_a_stop_while_the_last_goes_out_counts(tiny: Tiny) -> None:
    run(tiny)
    tiny.board.stop("finish-migrate")
    stop_by_command(tiny.board)
    assert tiny.board.run_state == "finish-migrate"
    assert tiny.board._control.state_to_store == "paused"
    tiny.board.return_from_sending()
    assert tiny.board.run_state == "paused"
    tiny.board.cont()
    assert tiny.board.run_state == "running"
    tiny.board.stop("finish-migrate")
    assert tiny.board._control.state_to_store == "running"
