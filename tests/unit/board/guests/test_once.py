"""Whenever a board is stopped or interrupted, each of the guest's instructions runs once."""

from __future__ import annotations

import re
import time
from collections.abc import Callable
from pathlib import Path

from stillframe.board.guests import build_guest
from tests.unit.board.guests.running import TIMEOUT_S, RunningGuest

HERE = Path(__file__).parent
STOPS = 200


def test_stops_and_interrupts(own_guest: Callable[[str], Path], tmp_path: Path) -> None:
    del own_guest  # it skips where nothing can be compiled
    elf = tmp_path / "once.elf"
    assert build_guest(HERE / "once.c", elf) == ""
    with RunningGuest(elf) as guest:
        sums_gpa = int(guest.wait("^once ready").split("at=")[1])
        for _ in range(STOPS):
            _wait_for_change(guest, sums_gpa)
            guest.board.stop()
            guest.board.cont()
        answer = guest.ask("", "^once rounds")
        numbers = re.findall("=([0-9]+)", answer)
        rounds, added, increased, ticks = map(int, numbers)
        assert rounds == added == increased, answer
        assert rounds
        assert ticks > 20
        assert guest.exit_status() == 0


def _wait_for_change(guest: RunningGuest, gpa: int) -> None:
    before, deadline = guest.read(gpa, 8), time.monotonic() + TIMEOUT_S
    while guest.read(gpa, 8) == before:
        assert time.monotonic() < deadline, "the guest does not go on"
