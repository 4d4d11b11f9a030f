"""The door of this wing: its commands and hooks. See ``stillframe.wings``."""

from __future__ import annotations

from stillframe.wings import Wing

WING = Wing(
    commands={"board": "stillframe.board.cli.board", "demo": "stillframe.board.cli.demo"},
    hooks={
        "machine": "stillframe.board.process_board:KIND",
        "still": "stillframe.board.state.board_cpu:SAVED",
        "restore": "stillframe.board.restore_plan:PLANNER",
        "doctor": "stillframe.board.doctor:CHECKS",
    },
)
