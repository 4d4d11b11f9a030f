"""The judgement on what makes a snapshot unsafe, before it, or wrong, while RAM was saved."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Sequence
from typing import NamedTuple

from stillframe.errors import BusyError, RefusedError, SnapshotFailed
from stillframe.machine import Blocker, Machine, Watch
from stillframe.model import FOR_ANALYSIS, RamBlock
from stillframe.snapshot.hold import Hold
from stillframe.snapshot.options import SnapshotOptions
from stillframe.snapshot.ram_blocks import check_kept

_OF_DEVICES = frozenset({"migration-blocker", "unsavable-device", "suspended"})
"""Blockers that concern the device state only."""
_DROPPERS = frozenset({"balloon", "virtio-mem"})
"""Blockers through which the guest may give back file-backed RAM."""
_MAY_DROP_RAM = ("BALLOON_CHANGE", "MEMORY_DEVICE_SIZE_CHANGE")


class Findings(NamedTuple):
    """Result of the pre-flight. ``notes``: on blockers that do not prevent the snapshot.
    ``may_drop``: the guest may give RAM back during the snapshot."""

    notes: list[str]
    may_drop: bool


def check_fit(hold: Hold, options: SnapshotOptions) -> Findings:
    """Run the pre-flight.

    Raises:
        RefusedError: the snapshot would not be safe. BusyError: not now, but perhaps later.
    """
    blockers = hold.machine.preflight(options.mode)
    notes = []
    if options.for_analysis:
        notes = [FOR_ANALYSIS, *(_said(one) for one in blockers if one.name in _OF_DEVICES)]
    notes += [_said(one) for one in blockers if one.severity == "warn"]
    if any(one.severity == "refuse" for one in blockers):
        hold.forget()  # the blocker may have written to RAM unseen since the last snapshot
    refuse(blockers, hold, options)
    return Findings(notes, any(one.name in _DROPPERS for one in blockers))


def refuse(blockers: Sequence[Blocker], hold: Hold, options: SnapshotOptions) -> None:
    """Raise the blockers that count for these options, if there are any.

    Raises:
        RefusedError, BusyError: as :func:`check_fit`.
    """
    unasked = _OF_DEVICES if options.for_analysis else frozenset()
    unasked |= hold.own_blockers
    raise_first(h for h in blockers if h.severity != "warn" and h.name not in unasked)


def raise_first(blockers: Iterable[Blocker]) -> None:
    """Raise RefusedError or BusyError for the first blocker, if any; a RefusedError lists all."""
    refusals = tuple(blockers)
    if not refusals:
        return
    first = refusals[0]
    what = first.name + (f" (and {len(refusals) - 1} more)" if len(refusals) > 1 else "")
    if first.severity == "busy":
        raise BusyError(what, why=first.reason, remedy=first.remedy, guest_state="running")
    raise RefusedError(
        what,
        why=first.reason,
        remedy=first.remedy,
        reasons=tuple((h.name, h.reason, h.remedy) for h in refusals),
    )


def check_saved(hold: Hold, options: SnapshotOptions, watch: Watch) -> list[str]:
    """Judge what happened while RAM was saved; return notes on what did no harm.

    Args:
        watch: has watched the machine since before the instant.

    Raises:
        SnapshotFailed: RAM blocks vanished or were resized, or a device appeared that can write
            RAM behind the protection.
    """
    machine = hold.machine
    notes = check_kept(hold.signature, machine.blocks_signature())
    if options.mode == "background":
        _check_private_huge_pages(hold.blocks, watch)
    _check_writers(machine, options)
    seen = Counter(event.name for event in watch.seen())
    notes += [
        f"{name} came while RAM was saved" + (f" ({count} times)" if count > 1 else "")
        for name, count in seen.items()
        if name not in ("STOP", "RESUME")
    ]
    return notes


def _check_writers(machine: Machine, options: SnapshotOptions) -> None:
    for writer in machine.preflight(options.mode, "saved"):
        if writer.severity != "warn":
            raise SnapshotFailed(
                f"{writer.name} appeared while RAM was saved",
                why=writer.reason,
                remedy=writer.remedy,
                guest_state="running",
            )


def _check_private_huge_pages(blocks: Sequence[RamBlock], watch: Watch) -> None:
    """Raise SnapshotFailed if private huge pages may have been dropped.

    Punching a hole in a hugetlbfs file also drops a private mapping's own pages. No kernel
    interface reports that, or tells a refilled page from the one before."""
    private = [b for b in blocks if b.backing == "hugetlbfs" and not b.shared]
    dropped = [event.name for event in watch.seen() if event.name in _MAY_DROP_RAM]
    if private and dropped:
        raise SnapshotFailed(
            "the snapshot may not show one instant",
            why=f"{dropped[0]} came while {private[0].idstr} was saved, and private huge pages"
            " may be dropped unseen",
            remedy="take another one, with the balloon and memory hotplug at rest",
            guest_state="running",
        )


def _said(blocker: Blocker) -> str:
    return f"{blocker.name}: {blocker.reason}"
