"""A program snapshots the board that it runs itself, with the ordinary job."""

from __future__ import annotations

from pathlib import Path

import stillframe
import stillframe.board
from tests.support.waiting import wait_until
from tests.unit.board.tiny import RESULTS, TIMEOUT_S, compile_guest

COUNTER = "void _start(struct info *info, u64 cpu) { for (;;) results[cpu]++; }"


def count(board: stillframe.board.RunningBoard) -> int:
    return int.from_bytes(board.host.board.rams[0].read(RESULTS, 8), "little")


def test_its_snapshot_goes_on_in_another_board(tmp_path: Path) -> None:
    file = tmp_path / "a.still"
    with stillframe.board.start(compile_guest(COUNTER), ram_bytes=16 << 20, name="one") as board:
        before = count(board)
        taken = stillframe.take(board.machine, file).wait(TIMEOUT_S)
        assert taken.statistics.state == "completed"
        assert taken.statistics.downtime_ms < 1000
        after = count(board)
        assert stillframe.verify(file).missing_pages == 0
        with stillframe.open(file) as snapshot:
            record = snapshot.manifest.machine
        assert record is not None
        assert (record.vmm, record.name, record.guest_state) == ("board", "one", "running")
    with stillframe.board.start(incoming=file, paused=True) as other:
        assert other.host.migration.wait(TIMEOUT_S)
        saved = count(other)
        assert before <= saved <= after
        other.host.board.cont()
        wait_until(lambda: count(other) > saved)
        assert not other.wait(0.1)
