"""QMP commands that tell what the board is (QEMU ``qapi/machine.json``, ``block-core.json``)."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

from stillframe.machine.board.board import Board
from stillframe.machine.board.layout import SECTOR_BYTES, VCPUS_LIMIT
from stillframe.qmp.commands import CommandTable

_ARCHITECTURE = "x86_64"
_NO_UUID = "00000000-0000-0000-0000-000000000000"
_STAT_BLOCK_BYTES = 512


def add_query_commands(commands: CommandTable, board: Board) -> None:
    """Add them. None changes anything."""

    def add(name: str, answer: Callable[[Board], object]) -> None:
        commands.add(name, lambda _context, _arguments: answer(board))

    add("query-name", _name)
    add("query-uuid", _uuid)
    add("query-target", _target)
    add("query-kvm", _kvm)
    add("query-machines", _machines)
    add("query-cpus-fast", _cpus)
    add("query-block", _block)
    add("query-jobs", _jobs)


def _name(board: Board) -> object:
    return {"name": board.name} if board.name else {}


def _uuid(_board: Board) -> object:
    return {"UUID": _NO_UUID}


def _target(_board: Board) -> object:
    return {"arch": _ARCHITECTURE}


def _kvm(_board: Board) -> object:
    return {"enabled": False, "present": False}


def _jobs(_board: Board) -> object:
    return []


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
        "actual-size": Path(path).stat().st_blocks * _STAT_BLOCK_BYTES,
        "dirty-flag": False,
    }
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
