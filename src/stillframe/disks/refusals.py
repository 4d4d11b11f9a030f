"""The reasons why a drive cannot be captured at an instant, by name, each with a remedy that
works."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Final, Literal, get_args

from stillframe.disks.drives import Drive, foreign_jobs
from stillframe.errors import RefusedError
from stillframe.machine.process.vm_info import same_files
from stillframe.qmp.client import QmpClient

DiskKind = Literal["copy", "overlay", "none"]
DISKS: Final[tuple[DiskKind, ...]] = get_args(DiskKind)
_Reason = tuple[str, str, str]
_WITHOUT = "leave the disks out with --disks none"


def refuse_unfit(
    qmp: QmpClient,
    pid: int,
    copied: Sequence[Drive],
    frozen: Sequence[Drive],
    *,
    fd_passing: bool,
    managed_by: str = "",
) -> None:
    """Refuse drives that cannot be copied or frozen. Nothing was touched.

    Args:
        managed_by: the manager that keeps its own record of the disks.

    Raises:
        RefusedError: a drive cannot be copied or frozen; it lists all reasons.
    """
    reasons = [
        *_jobs(qmp),
        *_managed(frozen, managed_by),
        *_overlay_reasons(pid, frozen),
    ]
    if copied and not fd_passing:
        reasons.append(
            (
                "disks-over-tcp",
                "copies are handed to the VM as descriptors, and its QMP passes none",
                f"give the VM a unix socket for QMP, or {_WITHOUT}",
            )
        )
    if reasons:
        name, why, remedy = reasons[0]
        more = f" (and {len(reasons) - 1} more)" if len(reasons) > 1 else ""
        raise RefusedError(f"{name}{more}", why=why, remedy=remedy, reasons=tuple(reasons))


def _jobs(qmp: QmpClient) -> Iterator[_Reason]:
    for job, kind in foreign_jobs(qmp):
        yield (
            "block-job",
            f"a block job of somebody else works on the VM's disks: '{job}' ({kind})",
            f"wait for it to end, or cancel it; or {_WITHOUT}",
        )


def _managed(frozen: Sequence[Drive], managed_by: str) -> Iterator[_Reason]:
    if frozen and managed_by:
        yield (
            "managed-disks",
            f"{managed_by} would not know of the overlay over disk {frozen[0].label}, and its next"
            " backup or snapshot would start from the frozen image",
            "take it with --disks copy",
        )


def _overlay_reasons(pid: int, frozen: Sequence[Drive]) -> Iterator[_Reason]:
    if frozen and not same_files(Path(f"/proc/{pid}")):
        yield (
            "other-files",
            "the VM sees other files than we do, and could not be started with an overlay of ours",
            "take it with --disks copy",
        )
    for drive in frozen:
        copy = "take it with --disks copy"
        if drive.encrypted:
            why = f"an overlay over disk {drive.label} ({drive.driver}, encrypted) would hold"
            remedy = copy if drive.luks else _WITHOUT
            yield "encrypted-disk", f"{why} plain text", remedy
        elif drive.temporary:
            yield "temporary-disk", f"disk {drive.label} is a temporary file (snapshot=on)", copy
        elif drive.file is None:
            why = f"disk {drive.label} is not a file or block device here, but {drive.filename}"
            yield "remote-disk", f"{why}: nobody could tell that it stays frozen", copy
        elif "/dev/fdset/" in drive.filename:
            yield "disk-by-descriptor", f"disk {drive.label} was given as a descriptor", copy
