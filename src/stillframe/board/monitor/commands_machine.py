"""QMP commands that describe the board, and that query or change its run state (QEMU
``qapi/machine.json``, ``block-core.json``, ``run-state.json``, ``misc.json``).

The board itself sends their events.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable
from pathlib import Path

from stillframe.board.hardware.board import Board
from stillframe.board.hardware.layout import SECTOR_BYTES, VCPUS_LIMIT
from stillframe.board.monitor.command_set import CommandTable
from stillframe.qmp.errors import QmpError

_ARCHITECTURE = "x86_64"
_NO_UUID = "00000000-0000-0000-0000-000000000000"
_STAT_BLOCK_BYTES = 512
_NEEDS_RESET = frozenset({"internal-error", "shutdown"})
"""QEMU ``system/runstate.c``: runstate_needs_reset."""


def add_machine_commands(commands: CommandTable, board: Board) -> None:
    """Add the commands to the table."""
    answers: dict[str, Callable[[], object]] = {
        "query-name": lambda: {"name": board.name} if board.name else {},
        "query-uuid": lambda: {"UUID": _NO_UUID},
        "query-target": lambda: {"arch": _ARCHITECTURE},
        "query-kvm": lambda: {"enabled": False, "present": False},
        "query-jobs": list,
        "query-machines": lambda: _machines(board),
        "query-cpus-fast": lambda: _cpus(board),
        "query-block": lambda: _block(board),
        "query-status": lambda: {
            "status": board.run_state,
            "running": board.run_state == "running",
        },
        "stop": board.stop,
        "cont": lambda: _cont(board),
        "system_reset": board.reset,
        "system_powerdown": board.powerdown,
        "quit": board.quit,
    }

    def add(name: str, answer: Callable[[], object]) -> None:
        commands.add(name, lambda _context, _arguments: answer())

    for name, answer in answers.items():
        add(name, answer)


def _cont(board: Board) -> None:
    if board.run_state in _NEEDS_RESET:
        raise QmpError("Resetting the Virtual Machine is required")
    board.cont()


def _machines(board: Board) -> object:
    return [
        {
            "name": board.machine_type,
            "is-default": True,
            "cpu-max": VCPUS_LIMIT,
            "hotpluggable-cpus": False,
            "numa-mem-supported": False,
            "deprecated": False,
            "default-ram-id": "board.ram",
        }
    ]


def _cpus(board: Board) -> object:
    return [
        {
            "cpu-index": index,
            "qom-path": f"/machine/cpu[{index}]",
            "thread-id": thread_id,
            "props": {"socket-id": 0, "core-id": index, "thread-id": 0},
            "target": _ARCHITECTURE,
        }
        for index, thread_id in enumerate(board.vcpu_thread_ids())
    ]


def _block(board: Board) -> object:
    disk = board.hardware.disk
    if disk is None:
        return []
    path = disk.path
    image = {
        "filename": path,
        "format": "raw",
        "virtual-size": disk.sectors * SECTOR_BYTES,
        "dirty-flag": False,
    }
    with contextlib.suppress(OSError):  # removed under its name; QEMU leaves the size out, too
        image["actual-size"] = Path(path).stat().st_blocks * _STAT_BLOCK_BYTES
    unlimited = dict.fromkeys(("bps", "bps_rd", "bps_wr", "iops", "iops_rd", "iops_wr"), 0)
    inserted = unlimited | {
        "file": path,
        "node-name": "disk0",
        "drv": "raw",
        "ro": False,
        "encrypted": False,
        "backing_file_depth": 0,
        "detect_zeroes": "off",
        "write_threshold": 0,
        "cache": {"writeback": True, "direct": False, "no-flush": False},
        "image": image,
    }
    return [
        {
            "device": "disk0",
            "qdev": "/machine/block",
            "type": "unknown",
            "removable": False,
            "locked": False,
            "io-status": "ok",
            "inserted": inserted,
        }
    ]
