"""The checks of one VM: its monitor, its RAM, and what blocks a snapshot. The guest is not
touched."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Final

import msgspec

from stillframe.doctor.checks import (
    BEING_FILLED,
    Check,
    CheckStatus,
    from_error,
    is_of_filler,
)
from stillframe.errors import HostError, NotFoundError, RefusedError, StillframeError, UsageError
from stillframe.machine.finding import connect
from stillframe.machine.process.machine import ProcessMachine
from stillframe.model import RamBlock
from stillframe.qmp.connection import address_text
from stillframe.restore.restored import find_restored

_ARM_NS_PER_PAGE: Final = 62
"""Measured: write-protecting a populated 4 KiB page takes 61 to 65 ns."""
_RESIDENT: Final = ("RssAnon", "RssShmem", "RssFile", "HugetlbPages")


class VmChecks(msgspec.Struct, frozen=True):
    """The findings about a VM; ``vmm`` is None if connecting to its monitor failed."""

    checks: tuple[Check, ...]
    vmm: str | None = None


def vm_checks(ref: str) -> VmChecks:
    """Check one VM.

    Args:
        ref: as ``machine.finding.connect`` takes it.

    Raises:
        NotFoundError, UsageError: there is no such VM.
    """
    try:
        machine = connect(ref)
    except (NotFoundError, UsageError):
        raise
    except StillframeError as error:
        return VmChecks((from_error("vm", "monitor", error),))
    checks: list[Check] = []
    with machine:
        try:
            checks.append(_monitor(machine))
            filled = _is_being_filled(machine.pid)
            if filled:
                checks.append(_check("image", "warn", BEING_FILLED))
            checks += [
                _check(
                    blocker.name,
                    "warn" if blocker.severity == "warn" else "fail",
                    blocker.reason,
                    blocker.remedy,
                )
                for blocker in machine.preflight()
                if not (filled and is_of_filler(blocker.name))
            ]
            checks.append(_right(machine))
            blocks = machine.ram_blocks()
            checks += [_ram(machine.pid, blocks), *map(_block, blocks)]
        except StillframeError as error:
            checks.append(from_error("vm", error.kind, error))
    return VmChecks(tuple(checks), machine.info.vmm)


def _is_being_filled(pid: int) -> bool:
    try:
        return find_restored(str(pid)).is_being_filled
    except (NotFoundError, UsageError):
        return False


def _check(name: str, status: CheckStatus, found: str, remedy: str = "") -> Check:
    return Check(subject="vm", name=name, status=status, found=found, remedy=remedy)


def _monitor(machine: ProcessMachine) -> Check:
    vmm = "QEMU" if machine.info.vmm == "qemu" else machine.info.vmm
    return _check(
        "monitor",
        "ok",
        f"{vmm} {machine.version} at {address_text(machine.qmp.address)},"
        f" machine {machine.machine_type()}, {machine.accelerator()}, {machine.status()}",
    )


def _right(machine: ProcessMachine) -> Check:
    try:
        machine.check_right()
    except (HostError, RefusedError) as error:
        return from_error("vm", "right", error)
    return _check("right", "ok", "a userfaultfd of its memory may be made")


def _ram(pid: int, blocks: Sequence[RamBlock]) -> Check:
    total_bytes = sum(block.used_length_bytes for block in blocks)
    populated_bytes = _populated_bytes(pid, blocks)
    arm_ms = populated_bytes / 4096 * _ARM_NS_PER_PAGE / 1e6
    return _check(
        "ram",
        "ok",
        f"{len(blocks)} blocks, {total_bytes / (1 << 20):.0f} MiB; the process has"
        f" {populated_bytes / (1 << 20):.0f} MiB in memory, so arming takes at most about"
        f" {arm_ms:.0f} ms (the guest runs meanwhile)",
    )


def _block(block: RamBlock) -> Check:
    where = f" {block.backing_path}" if block.backing_path else ""
    shared = "shared" if block.shared else "private"
    return _check(
        "ram-block",
        "ok",
        f"{block.idstr}: {block.used_length_bytes} bytes, {shared} {block.backing}{where},"
        f" pages of {block.page_size_bytes} bytes",
    )


def _populated_bytes(pid: int, blocks: Sequence[RamBlock]) -> int:
    """Estimate how much of the VM's RAM is resident, from its process's counters (proc(5))."""
    resident_bytes = 0
    try:
        for line in Path(f"/proc/{pid}/status").read_text().splitlines():
            name, _, value = line.partition(":")
            if name in _RESIDENT:
                resident_bytes += int(value.split()[0]) * 1024
    except (OSError, ValueError, IndexError):
        return 0
    return min(resident_bytes, sum(block.used_length_bytes for block in blocks))
