"""What may be done to a board whose state is on its way, and what a stop means then."""

from __future__ import annotations

import signal
import threading
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from stillframe.board.hardware.board import Board
from stillframe.board.monitor.command_set import CommandContext, CommandTable
from stillframe.board.monitor.commands_machine import add_machine_commands
from stillframe.board.monitor.descriptors import ClientDescriptors, FdSets
from stillframe.errors import MachineError
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
    add_machine_commands(commands, board)
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


def test_threads_that_write_to_ram_can_take_its_faults() -> None:
    """Whatever mask they inherit: the kernel kills the process at a fault of one that blocks
    SIGSEGV."""
    before = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGSEGV})
    try:
        with Tiny(SPIN) as tiny:
            run(tiny)
            writers = [
                thread.native_id or 0
                for thread in threading.enumerate()
                if thread.name in ("stillframe-vcpu0", "stillframe-block", "stillframe-entropy")
            ]
            assert len(writers) == 3
            tiny.until(lambda: not any(_blocks_faults(thread_id) for thread_id in writers))
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


@pytest.mark.parametrize("deed", [Board.reset, lambda board: board.plug_dimm(1 << 20)])
def test_whoever_writes_to_ram_by_a_command_can_take_its_faults(
    tiny: Tiny, deed: Callable[[Board], None]
) -> None:
    run(tiny)
    seen: list[bool] = []

    def command() -> None:
        signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGSEGV})
        deed(tiny.board)
        seen.append(_blocks_faults(threading.get_native_id()))

    thread = threading.Thread(target=command)
    thread.start()
    thread.join()
    assert seen == [False]


def _blocks_faults(thread_id: int) -> bool:
    status = Path(f"/proc/self/task/{thread_id}/status").read_text()
    mask = int(status.split("SigBlk:")[1].split()[0], 16)
    return bool(mask & 1 << signal.SIGSEGV - 1)


@pytest.mark.parametrize("stored", ["inmigrate", "finish-migrate", "postmigrate", "save-vm"])
def test_a_stored_state_that_only_migrations_have_is_paused(tiny: Tiny, stored: str) -> None:
    tiny.board.start_incoming()
    tiny.board.global_state.run_state = stored
    tiny.board.finish_incoming()
    assert tiny.board.run_state == "paused"
    tiny.board.cont()
