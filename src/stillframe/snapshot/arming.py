"""The steps from a write protection to armed RAM, before the stop; ``cleanup`` undoes each."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import ExitStack

from stillframe.capture.ram_capture import RamCapture
from stillframe.capture.write_protection import WriteProtection
from stillframe.model import RamBlock
from stillframe.snapshot import faultpoints
from stillframe.snapshot.job import JobControl


def open_capture(
    control: JobControl,
    cleanup: ExitStack,
    protection: WriteProtection | None,
    pid: int,
    blocks: Sequence[RamBlock],
    *,
    spill_bytes: int,
) -> RamCapture:
    """Open a capture and attach it to the job's progress; the guest is not touched.

    Args:
        protection: closed by ``cleanup``; None for a guest that stands still throughout.

    Raises:
        RefusedError, HostError: as ``RamCapture``.
    """
    if protection is not None:
        cleanup.callback(protection.close)
        control.progress.protection = protection.kind
    ram = RamCapture(protection, pid, blocks, spill_bytes=spill_bytes)
    cleanup.callback(ram.close)
    control.progress.ram = ram
    faultpoints.reach("attached")
    return ram


def arm_capture(
    control: JobControl, cleanup: ExitStack, ram: RamCapture, *, arm: bool = True
) -> None:
    """Register all RAM, serve faults, and with ``arm`` protect it while the guest runs.

    Raises:
        SnapshotCancelled: the job was cancelled.
        StillframeError: RAM cannot be protected.
    """
    cleanup.callback(ram.release)
    control.enter("setup", "arming")
    ram.register()
    faultpoints.reach("registered")
    ram.start()
    control.progress.arm_ms = ram.arm() if arm else 0.0
    faultpoints.reach("armed")
